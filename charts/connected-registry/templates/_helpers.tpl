{{/* Labels of an object: (list . name). */}}
{{- define "connected-registry.labels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/part-of: connected-registry
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
{{- end }}

{{/* metadata of a namespaced object: (list . object-name app-name). */}}
{{- define "connected-registry.metadata" -}}
{{- $root := index . 0 -}}
name: {{ index . 1 }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "connected-registry.labels" (list $root (index . 2)) | nindent 2 }}
{{- end }}

{{- define "connected-registry.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* What every pod has: (list . component-values). */}}
{{- define "connected-registry.pod" -}}
{{- $root := index . 0 -}}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with index . 1 }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/* Security of a pod that needs nothing of the node. */}}
{{- define "connected-registry.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  # The volume is large: it is only walked through when its root is another's.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "connected-registry.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "connected-registry.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: health}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: health}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: health}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
{{- end }}

{{/* The Secret with a certificate of one's own. Replicas mount the syncer's copy
of it, connected-registry-tls, which follows once every node trusts its CA. */}}
{{- define "connected-registry.tlsSecret" -}}
{{ .Values.tls.secret | default "connected-registry-tls-own" }}
{{- end }}

{{/* The labels of the nodes that agents run on, Linux aside. */}}
{{- define "connected-registry.agentNodes" -}}
{{- $nodes := deepCopy .Values.agent.nodeSelector }}
{{- if .Values.trustDistribution.useNodeSelector }}
{{- $_ := set $nodes "containerd-configured-by" "connected-registry" }}
{{- end }}
{{- toYaml $nodes }}
{{- end }}

{{/* The spec of the ConnectedRegistry. */}}
{{- define "connected-registry.spec" -}}
{{- $spec := dict }}
{{- range $key := list "mode" "repositories" "upstreams" "sync" "anonymousPull" "clientTokens" "mirrors" "immutableTags" "quota" "garbageCollection" "notifications" "suspend" "logLevel" "nodeCache" }}
{{- with get $.Values $key }}
{{- $_ := set $spec $key . }}
{{- end }}
{{- end }}
{{- with .Values.registryLoginServer }}
{{- $_ := set $spec "loginServer" . }}
{{- end }}
{{- /* Azure's sync token can read what is to be kept, and nothing else. */}}
{{- if and .Values.connectionString (not .Values.repositories) }}
{{- $_ := set $spec "repositories" (list (dict "name" "**")) }}
{{- end }}
{{- $parent := deepCopy .Values.parent }}
{{- if .Values.connectionString }}
{{- $_ := set $parent "connectionStringSecretRef" (dict "name" "connected-registry-connection-string") }}
{{- end }}
{{- with $parent }}
{{- $_ := set $spec "parent" . }}
{{- end }}
{{- $_ := set $spec "tls" (include "connected-registry.tls" . | fromYaml) }}
{{- $trust := omit .Values.trustDistribution "enabled" "useNodeSelector" }}
{{- with include "connected-registry.agentNodes" . | fromYaml }}
{{- $_ := set $trust "nodeSelector" . }}
{{- end }}
{{- if not .Values.trustDistribution.enabled }}
{{- $trust = dict "disabled" true }}
{{- end }}
{{- $_ := set $spec "trustDistribution" $trust }}
{{- toYaml $spec }}
{{- end }}

{{- define "connected-registry.tls" -}}
{{- if .Values.httpEnabled -}}
disabled: true
{{- else if or .Values.tls.secret .Values.tls.crt -}}
source: Secret
secretName: {{ include "connected-registry.tlsSecret" . }}
{{- else if index .Values "cert-manager" "enabled" -}}
source: CertManager
{{- else -}}
source: BuiltIn
{{- end -}}
{{- end }}

{{/* The Secrets with certificates that agents read. */}}
{{- define "connected-registry.caSecrets" -}}
- connected-registry-ca
{{- range .Values.trustDistribution.caSecrets }}
- {{ .name }}
{{- end }}
{{- end }}

{{/* Annotations of what helm runs before it removes the rest. */}}
{{- define "connected-registry.uninstallHook" -}}
annotations:
  helm.sh/hook: pre-delete
  helm.sh/hook-weight: {{ . | quote }}
  helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
