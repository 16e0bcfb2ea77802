{{/* Names, labels and the pieces that several workloads share. */}}

{{- define "ashlar.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains "ashlar" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-ashlar" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "ashlar.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/name: ashlar
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* Selector of a component: (list $ "metadata") */}}
{{- define "ashlar.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: ashlar
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Image of our programs: (list $ "daemons") or (list $ "node") */}}
{{- define "ashlar.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.image (index . 1) -}}
{{- if $image.digest -}}
{{ $root.Values.image.registry }}/{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $root.Values.image.registry }}/{{ $image.repository }}:{{ $image.tag | default $root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* Image of a sidecar: (list $ "provisioner") */}}
{{- define "ashlar.sidecarImage" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.csi.sidecars (index . 1) "image" -}}
{{ $root.Values.csi.sidecars.registry }}/{{ $image }}
{{- end -}}

{{- define "ashlar.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* host:port of member n: (list $ 1) */}}
{{- define "ashlar.member" -}}
{{- $root := index . 0 -}}
{{- $name := include "ashlar.fullname" $root -}}
{{ $name }}-metadata-{{ index . 1 }}.{{ $name }}-metadata.{{ $root.Release.Namespace }}.svc:{{ $root.Values.metadata.port }}
{{- end -}}

{{/* All members, as --metadata wants them. */}}
{{- define "ashlar.members" -}}
{{- $root := . -}}
{{- $all := list -}}
{{- range $n := untilStep 1 (int (add1 .Values.metadata.members)) 1 -}}
{{- $all = append $all (include "ashlar.member" (list $root $n)) -}}
{{- end -}}
{{- join "," $all -}}
{{- end -}}

{{/* The members that the cluster began with, as --bootstrap wants them. */}}
{{- define "ashlar.bootstrap" -}}
{{- $root := . -}}
{{- $all := list -}}
{{- range $n := untilStep 1 (int (add1 .Values.metadata.initialMembers)) 1 -}}
{{- $all = append $all (printf "%d=%s" $n (include "ashlar.member" (list $root $n))) -}}
{{- end -}}
{{- join "," $all -}}
{{- end -}}

{{/* Every address of a pod. */}}
{{- define "ashlar.any" -}}
{{- if eq .Values.ipFamily "IPv6" -}}[::]{{- else -}}0.0.0.0{{- end -}}
{{- end -}}

{{/* The pod's own address, from the variable POD_IP. */}}
{{- define "ashlar.own" -}}
{{- if eq .Values.ipFamily "IPv6" -}}[$(POD_IP)]{{- else -}}$(POD_IP){{- end -}}
{{- end -}}

{{- define "ashlar.priorityClass" -}}
{{- $root := index . 0 -}}
{{- $which := index . 1 -}}
{{- $given := index $root.Values.priorityClasses $which -}}
{{- if $given -}}
priorityClassName: {{ $given }}
{{- else if $root.Values.priorityClasses.create -}}
priorityClassName: {{ include "ashlar.fullname" $root }}-{{ $which }}
{{- end -}}
{{- end -}}

{{/* nodeSelector, affinity, tolerations of a component's values. */}}
{{- define "ashlar.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What a container without any need of the node runs with. */}}
{{- define "ashlar.restricted" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{/* Restarts pods when a script changes. */}}
{{- define "ashlar.scriptsChecksum" -}}
checksum/scripts: {{ (.Files.Glob "scripts/*").AsConfig | sha256sum }}
{{- end -}}

{{- define "ashlar.env.pod" -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
{{- end -}}

{{/* The node's zone, where Kubernetes copies it to the pod (1.35 and newer); else empty. */}}
{{- define "ashlar.env.zone" -}}
- name: ZONE
  valueFrom:
    fieldRef:
      fieldPath: metadata.labels['topology.kubernetes.io/zone']
{{- end -}}

{{- define "ashlar.env.metadata" -}}
- name: ASHLAR_METADATA
  value: {{ include "ashlar.members" . | quote }}
- name: ASHLAR_LOG
  value: {{ .Values.logLevel | quote }}
{{- end -}}
