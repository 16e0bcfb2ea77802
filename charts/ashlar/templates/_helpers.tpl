{{/* Names, labels, images and addresses that more than one template uses. */}}

{{- define "ashlar.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "ashlar.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "ashlar.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "ashlar.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Labels that never change. Call with (list $ "component"). */}}
{{- define "ashlar.selectorLabels" -}}
app.kubernetes.io/name: {{ include "ashlar.name" (index . 0) }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "ashlar.labels" -}}
{{- $root := index . 0 -}}
{{ include "ashlar.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: ashlar
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* An image of Ashlar's own. Call with (list $ .Values.image). */}}
{{- define "ashlar.image" -}}
{{- $root := index . 0 -}}{{- $image := index . 1 -}}
{{- $tag := default $root.Chart.AppVersion $image.tag -}}
{{- if $root.Values.imageRegistry -}}{{ trimSuffix "/" $root.Values.imageRegistry }}/{{- end -}}
{{ $image.repository }}:{{ $tag }}
{{- end }}

{{/* A sidecar's image. Call with (list $ "provisioner"). */}}
{{- define "ashlar.sidecarImage" -}}
{{- $sidecars := (index . 0).Values.sidecars -}}{{- $image := index $sidecars (index . 1) -}}
{{ trimSuffix "/" $sidecars.registry }}/{{ $image.repository }}:{{ $image.tag }}
{{- end }}

{{- define "ashlar.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* What a daemon listens on to be reached on every address. */}}
{{- define "ashlar.any" -}}
{{- if eq .Values.ipFamily "IPv6" -}}[::]{{- else -}}0.0.0.0{{- end -}}
{{- end }}

{{/* Domain of the metadata members. */}}
{{- define "ashlar.metadataDomain" -}}
{{ include "ashlar.fullname" . }}-metadata.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}
{{- end }}

{{/* host:port of every metadata member. */}}
{{- define "ashlar.metadata" -}}
{{- $list := list -}}
{{- range $n := untilStep 1 (int (add1 .Values.metadata.replicas)) 1 -}}
{{- $list = append $list (printf "%s-metadata-%d.%s:%d" (include "ashlar.fullname" $) $n (include "ashlar.metadataDomain" $) (int $.Values.metadata.port)) -}}
{{- end -}}
{{ join "," $list }}
{{- end }}

{{/* 1=host:port,2=... as --bootstrap takes it. */}}
{{- define "ashlar.bootstrap" -}}
{{- $list := list -}}
{{- range $i, $address := splitList "," (include "ashlar.metadata" .) -}}
{{- $list = append $list (printf "%d=%s" (add1 $i) $address) -}}
{{- end -}}
{{ join "," $list }}
{{- end }}

{{- define "ashlar.priorityControlPlane" -}}
{{- if .Values.priorityClasses.create -}}{{ include "ashlar.fullname" . }}-control-plane{{- else -}}{{ .Values.priorityClasses.controlPlane }}{{- end -}}
{{- end }}

{{- define "ashlar.priorityNode" -}}
{{- if .Values.priorityClasses.create -}}{{ include "ashlar.fullname" . }}-node{{- else -}}{{ .Values.priorityClasses.node }}{{- end -}}
{{- end }}

{{/* A container without rights. */}}
{{- define "ashlar.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* The pod of a hook, which runs a script with the ashlar command. Call with (list $ "name" "script" $env). */}}
{{- define "ashlar.hookPod" -}}
{{- $root := index . 0 -}}
metadata:
  labels:
    {{- include "ashlar.labels" (list $root "hook") | nindent 4 }}
spec:
  restartPolicy: Never
  serviceAccountName: default
  automountServiceAccountToken: false
  {{- include "ashlar.pullSecrets" $root | nindent 2 }}
  containers:
    - name: {{ index . 1 }}
      image: {{ include "ashlar.image" (list $root $root.Values.image) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: ["/bin/sh", "-c"]
      args:
        - |
          {{- $root.Files.Get (index . 2) | nindent 10 }}
      env:
        - name: ASHLAR_METADATA
          value: {{ include "ashlar.metadata" $root }}
        {{- with index . 3 }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        requests: {cpu: 10m, memory: 32Mi}
        limits: {memory: 128Mi}
      securityContext:
        {{- include "ashlar.restricted" $root | nindent 8 }}
{{- end }}
