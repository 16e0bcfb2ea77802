# Ashlar's two images. Build one with `--target ashlar` or `--target ashlar-node`.
#
#   ashlar        metadata-raft, storage-daemon, and the ashlar command; nothing else on top of the base
#   ashlar-node   nbd-client and csi-driver with the programs that they start: mkfs, fsck, mount, modprobe
#
# Arguments:
#   BASE      a Debian 12 image, or what is like it, for the result
#   BUILDER   an image with Rust 1.90 or newer and a C compiler
#   BINARIES  build (compile here) or prebuilt (take release programs from ./dist)
ARG BASE=debian:bookworm-slim
ARG BUILDER=rust:1.90-bookworm
ARG BINARIES=build

FROM ${BUILDER} AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p metadata-raft -p storage-daemon -p nbd-client -p csi-driver -p ashlar-cli \
    && mkdir /out \
    && for program in metadata-raft storage-daemon nbd-client csi-driver ashlar; do \
        strip --strip-unneeded -o "/out/$program" "target/release/$program" || exit 1; \
    done \
    && rm -rf target

FROM scratch AS prebuilt
COPY dist/ /out/

FROM ${BINARIES} AS binaries

FROM ${BASE} AS ashlar
# nbd-client reads and writes volumes for `ashlar backup`, which the metadata leader starts for schedules.
COPY --from=binaries /out/metadata-raft /out/storage-daemon /out/ashlar /out/nbd-client /usr/local/bin/
# Nobody in particular. The storage daemon needs root for block devices, and says so in its pod.
USER 65532:65532
CMD ["/usr/local/bin/ashlar", "help"]

FROM ${BASE} AS ashlar-node
RUN apt-get update \
    && apt-get install -y --no-install-recommends e2fsprogs xfsprogs util-linux mount kmod fuse3 libnbd-bin \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log
COPY --from=binaries /out/nbd-client /out/csi-driver /usr/local/bin/
# Both run as root on nodes: they mount. The controller part of csi-driver runs as 65532, as its pod says.
CMD ["/usr/local/bin/csi-driver", "--help"]
