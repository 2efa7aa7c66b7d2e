{{- define "manylora.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "manylora.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "manylora.commonLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "manylora.labels" -}}
{{ include "manylora.commonLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "manylora.serviceAccount" -}}
{{- .Values.serviceAccount.existingName | default (include "manylora.fullname" .) -}}
{{- end -}}

{{- define "manylora.tag" -}}
{{- .Values.image.tag | default (printf "%s%s" .Chart.AppVersion (ternary "-cuda" "" .Values.gpu.enabled)) -}}
{{- end -}}

{{- define "manylora.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ include "manylora.tag" . }}
{{- end -}}
{{- end -}}

{{- define "manylora.scheme" -}}
{{- ternary "HTTPS" "HTTP" (ne .Values.tls.existingSecret "") -}}
{{- end -}}

{{/* Whether the base is a hub id that an init container fetches: "true" or empty. */}}
{{- define "manylora.fetches" -}}
{{- if and .Values.model.fetch (regexMatch "^[^/]+/[^/]+$" .Values.model.source) -}}true{{- end -}}
{{- end -}}

{{/* A value as an option's word: Helm reads 1000000 as a floating-point number, and would write 1e+06. */}}
{{- define "manylora.word" -}}
{{- if kindIs "slice" . -}}
{{- join "," . -}}
{{- else if kindIs "float64" . -}}
{{- if eq (floor .) . -}}{{- printf "%.0f" . -}}{{- else -}}{{- printf "%v" . -}}{{- end -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* Seconds from the pod's deletion to SIGKILL. */}}
{{- define "manylora.graceSeconds" -}}
{{- $drain := get .Values.settings "drain_seconds" | default 30 -}}
{{- if hasKey .Values.settings "drain_seconds" -}}{{- $drain = get .Values.settings "drain_seconds" -}}{{- end -}}
{{- $delay := get .Values.settings "drain_delay_seconds" | default 0 -}}
{{- addf .Values.termination.preStopSeconds $drain $delay .Values.termination.marginSeconds | ceil | int -}}
{{- end -}}

{{/* Refuses values that render, but would give servers that do not start, or answer differently from each other. */}}
{{- define "manylora.check" -}}
{{- $shared := and .Values.database.existingSecret .Values.store.url -}}
{{- if and .Values.database.existingSecret (not .Values.store.url) -}}
{{- fail "database.existingSecret needs store.url: servers that share a registry must share the adapters' files, too" -}}
{{- end -}}
{{- if and (or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled) (not $shared) -}}
{{- fail "several servers need database.existingSecret and store.url: otherwise each knows other adapters" -}}
{{- end -}}
{{- if not (or .Values.keys.existingSecret .Values.database.existingSecret (get .Values.settings "allow_anonymous")) -}}
{{- fail "set keys.existingSecret, the secret with API keys; or settings.allow_anonymous=true to serve everybody" -}}
{{- end -}}
{{- if eq .Values.workload.kind "Deployment" -}}
{{- if and .Values.persistence.enabled (or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled) -}}
{{- fail "servers of a Deployment cannot share a volume: set persistence.enabled=false, or workload.kind=StatefulSet" -}}
{{- end -}}
{{- else if .Values.persistence.existingClaim -}}
{{- fail "persistence.existingClaim is for workload.kind=Deployment: a StatefulSet makes a claim for each server" -}}
{{- end -}}
{{- if and .Values.inferencePool.enabled .Values.keys.existingSecret -}}
{{- fail "inferencePool.enabled: the endpoint picker sends no API key; unset keys.existingSecret and let the gateway check keys" -}}
{{- end -}}
{{- end -}}

{{- define "manylora.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "manylora.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Where libraries write what they compile or download: not in the image, which is read-only. */}}
{{- define "manylora.folderEnv" -}}
- {name: HOME, value: /data}
- {name: HF_HOME, value: /data/hub}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: TRITON_CACHE_DIR, value: /cache/triton}
{{- with .Values.hub.existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: {{ $.Values.hub.secretKey | quote }}}}
{{- end }}
{{- end -}}

{{- define "manylora.pickerSelector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: picker
{{- end -}}

{{- define "manylora.pickerLabels" -}}
{{ include "manylora.commonLabels" . }}
app.kubernetes.io/component: picker
{{- end -}}
