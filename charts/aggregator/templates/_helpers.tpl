{{- define "image" -}}
{{- $v := index . 0 -}}{{- $name := index . 1 -}}{{- $tag := index . 2 -}}{{- $digest := index . 3 -}}{{- $chart := index . 4 -}}
{{ $v.image.registry }}/{{ $name }}{{ if $digest }}@{{ $digest }}{{ else }}:{{ $tag | default $chart.AppVersion }}{{ end }}
{{- end }}

{{- define "labels" -}}
app.kubernetes.io/name: {{ . }}
app.kubernetes.io/part-of: wardround
{{- end }}

{{- define "pod-security" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
# Once, when a volume is new: later it would make key files readable by the group, which both programs refuse.
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "container-security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "placement" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: [{{ range $i, $name := . }}{{ if $i }}, {{ end }}{name: {{ $name }}}{{ end }}]
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- end }}

{{- define "claim" -}}
{{- $name := index . 0 -}}{{- $storage := index . 1 -}}
{{- if not $storage.existingClaim }}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ $name }}
  labels: {app.kubernetes.io/part-of: wardround}
  # Stays when the release goes: it is what cannot be made again.
  annotations: {helm.sh/resource-policy: keep}
spec:
  accessModes: [ReadWriteOnce]
  {{- with $storage.storageClassName }}
  storageClassName: {{ . }}
  {{- end }}
  resources: {requests: {storage: {{ $storage.size }}}}
{{- end }}
{{- end }}

{{- define "mlflow-uri" -}}
{{- if .Values.mlflow.uri }}{{ .Values.mlflow.uri }}{{ else if .Values.mlflow.enabled }}http://mlflow:5000{{ end }}
{{- end }}

{{- define "mlflow-secret" -}}
{{- if .Values.mlflow.uri }}{{ .Values.mlflow.existingSecret }}{{ else if .Values.mlflow.enabled }}mlflow{{ end }}
{{- end }}

{{/* A Job before install and upgrade that makes a Secret in the pod, so that no template and no release holds it. */}}
{{- define "first-secret" -}}
{{- $top := index . 0 -}}{{- $image := index . 1 -}}{{- $args := index . 2 -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: first-secret
  annotations: {helm.sh/hook: "pre-install,pre-upgrade", helm.sh/hook-weight: "-2", helm.sh/hook-delete-policy: "before-hook-creation,hook-succeeded"}
automountServiceAccountToken: false
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: first-secret
  annotations: {helm.sh/hook: "pre-install,pre-upgrade", helm.sh/hook-weight: "-2", helm.sh/hook-delete-policy: "before-hook-creation,hook-succeeded"}
rules: [{apiGroups: [""], resources: [secrets], verbs: [create]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: first-secret
  annotations: {helm.sh/hook: "pre-install,pre-upgrade", helm.sh/hook-weight: "-1", helm.sh/hook-delete-policy: "before-hook-creation,hook-succeeded"}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: first-secret}
subjects: [{kind: ServiceAccount, name: first-secret, namespace: {{ $top.Release.Namespace }}}]
---
apiVersion: batch/v1
kind: Job
metadata:
  name: first-secret
  annotations: {helm.sh/hook: "pre-install,pre-upgrade", helm.sh/hook-weight: "0", helm.sh/hook-delete-policy: "before-hook-creation,hook-succeeded"}
spec:
  backoffLimit: 2
  activeDeadlineSeconds: 300
  template:
    metadata:
      labels: {{ include "labels" "first-secret" | nindent 8 }}
    spec:
      restartPolicy: Never
      serviceAccountName: first-secret
      automountServiceAccountToken: true
      enableServiceLinks: false
      securityContext: {{ include "pod-security" $top | nindent 8 }}
      {{- include "placement" $top | nindent 6 }}
      containers:
        - name: first-secret
          image: {{ include "image" (list $top.Values $image $top.Values.image.tag $top.Values.image.digest $top.Chart) }}
          imagePullPolicy: {{ $top.Values.image.pullPolicy }}
          args: {{ prepend $args $image | toJson }}
          terminationMessagePolicy: FallbackToLogsOnError
          securityContext: {{ include "container-security" $top | nindent 12 }}
          resources: {requests: {cpu: 10m, memory: 96Mi}, limits: {memory: 256Mi}}
{{- end }}
