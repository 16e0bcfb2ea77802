// csi-client talks to a CSI driver as the Go programs around it do: with the connection library that all of
// Kubernetes' CSI sidecars share (node-driver-registrar, livenessprobe, provisioner, attacher, resizer), and with
// bare grpc-go clients whose :authority is the socket's path, "localhost", or what grpc-go makes of a unix: target.
//
// Usage: csi-client SOCKET DRIVER-NAME. Prints a line per client; exits with 1 if one of them fails.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-lib-utils/connection"
	"github.com/kubernetes-csi/csi-lib-utils/metrics"
	"github.com/kubernetes-csi/csi-lib-utils/rpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Requests per client: from the second on, headers come from HPACK's dynamic table.
const requests = 5

const limit = 10 * time.Second

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: csi-client SOCKET DRIVER-NAME")
		os.Exit(2)
	}
	socket, driver := os.Args[1], os.Args[2]
	dialer := grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	})
	clients := []struct {
		name string
		run  func() (string, error)
	}{
		{"csi-lib-utils", func() (string, error) { return sidecar(socket) }},
		{"path as target", func() (string, error) { return plain("passthrough:///"+socket, dialer) }},
		{"path as authority", func() (string, error) {
			return plain("passthrough:///x", dialer, grpc.WithAuthority(socket))
		}},
		{"encoded path as authority", func() (string, error) {
			return plain("passthrough:///x", dialer, grpc.WithAuthority("%2Fcsi%2Fcsi.sock"))
		}},
		{"localhost as authority", func() (string, error) {
			return plain("passthrough:///x", dialer, grpc.WithAuthority("localhost"))
		}},
		{"unix target", func() (string, error) { return plain("unix://" + socket) }},
	}
	failed := false
	for _, client := range clients {
		name, err := client.run()
		if err == nil && name != driver {
			err = fmt.Errorf("the driver's name is %q, not %q", name, driver)
		}
		if err != nil {
			failed = true
			fmt.Printf("%s: FAILED: %v\n", client.name, err)
			continue
		}
		fmt.Printf("%s: ok\n", client.name)
	}
	if failed {
		os.Exit(1)
	}
}

// What every sidecar does when it starts, and livenessprobe at every probe.
func sidecar(socket string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	manager := metrics.NewCSIMetricsManager("")
	conn, err := connection.Connect(ctx, socket, manager, connection.WithTimeout(limit))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := rpc.ProbeForever(ctx, conn, limit); err != nil {
		return "", err
	}
	ready, err := rpc.Probe(ctx, conn)
	if err != nil || !ready {
		return "", fmt.Errorf("probe: ready %v, error %v", ready, err)
	}
	if _, err := rpc.GetPluginCapabilities(ctx, conn); err != nil {
		return "", err
	}
	return rpc.GetDriverName(ctx, conn)
}

func plain(target string, options ...grpc.DialOption) (string, error) {
	options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))
	conn, err := grpc.NewClient(target, options...)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	client := csi.NewIdentityClient(conn)
	name := ""
	for range requests {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		info, err := client.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
		cancel()
		if err != nil {
			return "", err
		}
		name = info.GetName()
	}
	return name, nil
}
