{{/* storage.yaml, as --storage takes it. Empty: content lies on a volume. */}}
{{- define "connected-registry.storageFile" -}}
{{- range $kind := list "s3" "azure" "gcs" }}
{{- with get $.Values.storage $kind }}
{{- $file := dict $kind . }}
{{- if $.Values.storage.caSecret }}
{{- $_ := set $file "caFile" "/etc/connected-registry/storage/ca.crt" }}
{{- end }}
{{- if $.Values.storage.credentialsSecret }}
{{- $_ := set $file "credentials" "/etc/connected-registry/storage-credentials" }}
{{- end }}
{{- toYaml $file }}
{{- end }}
{{- end }}
{{- end }}

{{/* Annotations of pods that use the storage: (list . podAnnotations). They
start anew when storage.yaml changes. */}}
{{- define "connected-registry.storageAnnotations" -}}
{{- $annotations := deepCopy (index . 1) }}
{{- with include "connected-registry.storageFile" (index . 0) }}
{{- $_ := set $annotations "connectedregistry.io/storage" (sha256sum .) }}
{{- end }}
{{- with $annotations }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{/* What a container mounts to reach an object store. */}}
{{- define "connected-registry.objectStoreMounts" -}}
- {name: object-store, mountPath: /etc/connected-registry/storage, readOnly: true}
{{- if .Values.storage.credentialsSecret }}
- {name: object-store-credentials, mountPath: /etc/connected-registry/storage-credentials, readOnly: true}
{{- end }}
{{- end }}

{{- define "connected-registry.objectStoreVolumes" -}}
- name: object-store
  projected:
    defaultMode: 0440
    sources:
    - configMap: {name: connected-registry-storage}
    {{- with .Values.storage.caSecret }}
    - secret: {name: {{ . }}, items: [{key: ca.crt, path: ca.crt}]}
    {{- end }}
{{- with .Values.storage.credentialsSecret }}
- name: object-store-credentials
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{- define "connected-registry.claimVolume" -}}
- name: storage
  persistentVolumeClaim:
    claimName: {{ .Values.pvc.existingClaim | default "connected-registry-storage" }}
{{- end }}
