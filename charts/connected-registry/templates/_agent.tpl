{{/* The files of a node are root's, so the program is root, with nothing else of
root's powers but, for the system's trust store, to run the node's own program
in the node's root. */}}
{{- define "connected-registry.agentSecurity" -}}
securityContext:
  runAsUser: 0
  runAsGroup: 0
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
    {{- if include "connected-registry.wholeRoot" . }}
    add: [SYS_CHROOT]
    {{- end }}
{{- end }}

{{- define "connected-registry.agentProbes" -}}
startupProbe:
  httpGet: {host: 127.0.0.1, path: /healthz, port: 8082}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {host: 127.0.0.1, path: /healthz, port: 8082}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {host: 127.0.0.1, path: /readyz, port: 8082}
  periodSeconds: 5
  timeoutSeconds: 2
{{- end }}

{{/* Whether the node's root has to be seen: to run its program in it, or to
restart its runtime. */}}
{{- define "connected-registry.wholeRoot" -}}
{{- if or .Values.trustDistribution.systemTrust .Values.trustDistribution.configureRuntime -}}
true
{{- end -}}
{{- end }}

{{- define "connected-registry.hostMounts" -}}
{{- if include "connected-registry.wholeRoot" . -}}
- {name: root, mountPath: /host, readOnly: true, mountPropagation: None, recursiveReadOnly: IfPossible}
{{ end -}}
- {name: containerd, mountPath: {{ printf "/host%s" .Values.agent.containerdPath }}}
- {name: state, mountPath: /host/var/lib/connected-registry}
{{- if .Values.trustDistribution.systemTrust }}
{{- range $i, $path := .Values.agent.trustPaths }}
- {name: trust-{{ $i }}, mountPath: {{ printf "/host%s" $path }}}
{{- end }}
{{- end }}
{{- if include "connected-registry.wholeRoot" . }}
- {name: tmp, mountPath: /host/tmp}
{{- end }}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "connected-registry.hostVolumes" -}}
{{- if include "connected-registry.wholeRoot" . -}}
- name: root
  hostPath: {path: /, type: Directory}
{{ end -}}
- name: containerd
  hostPath: {path: {{ .Values.agent.containerdPath }}, type: DirectoryOrCreate}
- name: state
  hostPath: {path: /var/lib/connected-registry, type: DirectoryOrCreate}
{{- if .Values.trustDistribution.systemTrust }}
{{- range $i, $path := .Values.agent.trustPaths }}
- name: trust-{{ $i }}
  hostPath: {path: {{ $path }}, type: DirectoryOrCreate}
{{- end }}
{{- end }}
- name: tmp
  emptyDir: {}
{{- end }}
