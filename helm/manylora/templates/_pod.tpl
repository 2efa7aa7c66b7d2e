{{/* The servers' pod. */}}
{{- define "manylora.pod" -}}
metadata:
  # Without the chart's version, whose change alone restarts nothing.
  labels:
    {{- include "manylora.selector" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # A changed option restarts the servers.
    checksum/settings: {{ include "manylora.settings" . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "manylora.serviceAccount" . }}
  automountServiceAccountToken: false
  # A service named manylora would set MANYLORA_PORT and others, which look like options.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "manylora.graceSeconds" . }}
  securityContext:
    {{- include "manylora.podSecurity" . | nindent 4 }}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- include "manylora.scheduling" . | nindent 2 }}
  {{- if include "manylora.fetches" . }}
  initContainers:
    {{- include "manylora.fetchContainer" . | nindent 4 }}
  {{- end }}
  containers:
    {{- include "manylora.serverContainer" . | nindent 4 }}
  volumes:
    {{- include "manylora.volumes" . | nindent 4 }}
{{- end -}}

{{- define "manylora.scheduling" -}}
{{- with .Values.priorityClassName -}}
priorityClassName: {{ . }}
{{ end }}
{{- with .Values.gpu -}}
{{- if and .enabled .runtimeClassName -}}
runtimeClassName: {{ .runtimeClassName }}
{{ end }}
{{- end }}
{{- with .Values.nodeSelector -}}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{ end }}
{{- with .Values.tolerations -}}
tolerations:
  {{- toYaml . | nindent 2 }}
{{ end }}
{{- with .Values.affinity -}}
affinity:
  {{- toYaml . | nindent 2 }}
{{ end }}
{{- if .Values.topologySpread.whenUnsatisfiable -}}
topologySpreadConstraints:
  {{- range .Values.topologySpread.keys }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: {{ $.Values.topologySpread.whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "manylora.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Downloads and quantises the base once: the server then needs no hub. It has the server's options and mounts. */}}
{{- define "manylora.fetchContainer" -}}
- name: fetch
  image: {{ include "manylora.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args: [fetch]
  {{- include "manylora.environment" . | nindent 2 }}
  securityContext:
    {{- include "manylora.containerSecurity" . | nindent 4 }}
  resources:
    {{- toYaml .Values.resources | nindent 4 }}
  {{- include "manylora.mounts" . | nindent 2 }}
{{- end -}}

{{- define "manylora.serverContainer" -}}
- name: server
  image: {{ include "manylora.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args: [serve]
  {{- include "manylora.environment" . | nindent 2 }}
  ports:
    - {name: http, containerPort: 8000}
  securityContext:
    {{- include "manylora.containerSecurity" . | nindent 4 }}
  resources:
    {{- $resources := deepCopy .Values.resources }}
    {{- if .Values.gpu.enabled }}
    {{- $gpus := dict .Values.gpu.resource (int .Values.gpu.count) }}
    {{- $resources = merge (dict "limits" $gpus "requests" $gpus) $resources }}
    {{- end }}
    {{- toYaml $resources | nindent 4 }}
  {{- $scheme := include "manylora.scheme" . }}
  {{- $probes := .Values.probes }}
  # Ready, and not only alive: liveness begins when the base is loaded and adapters are checked.
  startupProbe:
    httpGet: {path: /readyz, port: http, scheme: {{ $scheme }}}
    periodSeconds: {{ $probes.startup.periodSeconds }}
    timeoutSeconds: {{ $probes.startup.timeoutSeconds }}
    failureThreshold: {{ divf $probes.startupSeconds $probes.startup.periodSeconds | ceil | int }}
  readinessProbe:
    httpGet: {path: /readyz, port: http, scheme: {{ $scheme }}}
    {{- toYaml $probes.readiness | nindent 4 }}
  livenessProbe:
    httpGet: {path: /livez, port: http, scheme: {{ $scheme }}}
    {{- toYaml $probes.liveness | nindent 4 }}
  {{- if .Values.termination.preStopSeconds }}
  lifecycle:
    preStop:
      exec: {command: [sleep, {{ .Values.termination.preStopSeconds | quote }}]}
  {{- end }}
  {{- include "manylora.mounts" . | nindent 2 }}
{{- end -}}

{{/* The options, by ConfigMap and secrets. */}}
{{- define "manylora.environment" -}}
envFrom:
  - configMapRef: {name: {{ include "manylora.fullname" . }}}
  {{- with .Values.store.existingSecret }}
  - secretRef: {name: {{ . | quote }}}
  {{- end }}
env:
  {{- include "manylora.folderEnv" . | nindent 2 }}
  {{- with .Values.database.existingSecret }}
  - name: MANYLORA_DATABASE_URL
    valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: {{ $.Values.database.secretKey | quote }}}}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "manylora.mounts" -}}
volumeMounts:
  - {name: data, mountPath: /data}
  - {name: tmp, mountPath: /tmp}
  - {name: cache, mountPath: /cache}
  {{- if .Values.keys.existingSecret }}
  - {name: keys, mountPath: /etc/manylora/keys, readOnly: true}
  {{- end }}
  {{- if .Values.tls.existingSecret }}
  - {name: tls, mountPath: /etc/manylora/tls, readOnly: true}
  {{- end }}
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "manylora.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.scratch.tmpSize }}}
- name: cache
  emptyDir: {sizeLimit: {{ .Values.scratch.cacheSize }}}
{{- with .Values.keys.existingSecret }}
- name: keys
  secret: {secretName: {{ . | quote }}, defaultMode: 0440}
{{- end }}
{{- with .Values.tls.existingSecret }}
- name: tls
  secret: {secretName: {{ . | quote }}, defaultMode: 0440}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- if not .Values.persistence.enabled }}
- name: data
  emptyDir: {sizeLimit: {{ .Values.persistence.size }}}
{{- else if eq .Values.workload.kind "Deployment" }}
- name: data
  persistentVolumeClaim: {claimName: {{ .Values.persistence.existingClaim | default (include "manylora.fullname" .) | quote }}}
{{- end }}
{{- end -}}

{{- define "manylora.claimSpec" -}}
accessModes: {{ toJson .Values.persistence.accessModes }}
{{- with .Values.persistence.storageClassName }}
storageClassName: {{ . | quote }}
{{- end }}
resources:
  requests:
    storage: {{ .Values.persistence.size }}
{{- end -}}

{{/* The ConfigMap's data: the server's options. Secrets are not among them. */}}
{{- define "manylora.settings" -}}
MANYLORA_HOST: 0.0.0.0
MANYLORA_PORT: "8000"
MANYLORA_DATA_DIR: /data
MANYLORA_MODEL: {{ .Values.model.source | quote }}
MANYLORA_DEVICE: {{ ternary "cuda" "cpu" .Values.gpu.enabled }}
{{- with .Values.adapters }}
{{- $pairs := list }}
{{- range . }}
{{- $pairs = append $pairs (printf "%s=%s" .name .source) }}
{{- end }}
MANYLORA_ADAPTER: {{ join "," $pairs | quote }}
{{- end }}
{{- if .Values.keys.existingSecret }}
MANYLORA_API_KEY_FILE: {{ printf "/etc/manylora/keys/%s" .Values.keys.secretKey | quote }}
{{- end }}
{{- with .Values.store.url }}
MANYLORA_STORE_URL: {{ . | quote }}
{{- end }}
{{- if .Values.tls.existingSecret }}
MANYLORA_TLS_CERT: /etc/manylora/tls/tls.crt
MANYLORA_TLS_KEY: /etc/manylora/tls/tls.key
{{- end }}
{{- $name := include "manylora.fullname" . }}
{{- $namespaced := printf "%s.%s" $name .Release.Namespace }}
{{- $hosts := list $name $namespaced (printf "%s.svc" $namespaced) (printf "%s.svc.cluster.local" $namespaced) }}
# The service's names, which a server without keys must know.
MANYLORA_ALLOWED_HOST: {{ concat $hosts (get .Values.settings "allowed_host" | default list) | join "," | quote }}
{{- range $name, $value := omit .Values.settings "allowed_host" }}
MANYLORA_{{ upper $name }}: {{ include "manylora.word" $value | quote }}
{{- end }}
{{- end -}}
