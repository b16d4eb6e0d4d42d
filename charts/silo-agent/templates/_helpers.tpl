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

{{/* The pod of trainer or ingest: no key, no Kubernetes token, no way but to the desk. */}}
{{- define "helper-pod" -}}
{{- $top := index . 0 -}}{{- $program := index . 1 -}}{{- $own := index . 2 -}}{{- $args := index . 3 -}}{{- $env := index . 4 -}}{{- $volumes := index . 5 -}}{{- $mounts := index . 6 -}}
metadata:
  labels:
    {{- include "labels" (printf "silo-%s" $program) | nindent 4 }}
    wardround.org/silo: {{ $top.Values.silo | default "none" | quote }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: 5
  securityContext: {{ include "pod-security" $top | nindent 4 }}
  {{- with $top.Values.image.pullSecrets }}
  imagePullSecrets: [{{ range $i, $name := . }}{{ if $i }}, {{ end }}{name: {{ $name }}}{{ end }}]
  {{- end }}
  containers:
    - name: {{ $program }}
      image: {{ include "image" (list $top.Values "trainer" $top.Values.trainerImage.tag $top.Values.trainerImage.digest $top.Chart) }}
      imagePullPolicy: {{ $top.Values.image.pullPolicy }}
      args: {{ concat (list $program (printf "--agent=silo-agent.%s.svc:8444" $top.Release.Namespace)) $args | toJson }}
      env: {{ concat $env (list (dict "name" "HOME" "value" "/tmp")) $own.extraEnv | toJson }}
      terminationMessagePolicy: FallbackToLogsOnError
      securityContext: {{ include "container-security" $top | nindent 8 }}
      resources: {{ toJson $own.resources }}
      volumeMounts: {{ concat $mounts (list (dict "name" "tmp" "mountPath" "/tmp")) $own.extraVolumeMounts | toJson }}
  volumes: {{ concat $volumes (list (dict "name" "tmp" "emptyDir" (dict "sizeLimit" "2Gi"))) $own.extraVolumes | toJson }}
{{- end }}

{{- define "desk-env" -}}
- {name: WARDROUND_DESK_TOKEN, valueFrom: {secretKeyRef: {name: silo-agent-desk, key: {{ . }}.token}}}
- {name: WARDROUND_DESK_CA, valueFrom: {secretKeyRef: {name: silo-agent-desk, key: tls.crt}}}
{{- end }}

{{/* The snapshots are read-only in its container. Not the whole volume where ingest shares it: whoever mounts a local volume first
     sets its group, and a read-only mount sets none, so that ingest could not write. */}}
{{- define "trainer-pod" -}}
{{- $t := .Values.trainer -}}
{{- $own := deepCopy $t -}}
{{- if $t.gpu.count }}{{- $_ := set $own.resources "limits" (merge (dict $t.gpu.resource $t.gpu.count) $own.resources.limits) }}{{- end }}
{{- $claim := ternary .Values.snapshots.trainerClaim (.Values.snapshots.existingClaim | default "silo-snapshots") (eq $t.mode "job") -}}
{{- $env := list (dict "name" "OMP_NUM_THREADS" "value" (toString $t.threads)) -}}
{{- $args := list -}}
{{- if eq $t.mode "job" }}{{- $args = list (printf "--idle-seconds=%d" (int $t.idleSeconds)) }}{{- else }}{{- $env = concat $env (include "desk-env" "trainer" | fromYamlArray) }}{{- end }}
{{- $pod := include "helper-pod" (list . "trainer" $own $args $env
    (list (dict "name" "snapshots" "persistentVolumeClaim" (merge (dict "claimName" $claim) (ternary (dict "readOnly" true) dict (eq $t.mode "job")))))
    (list (dict "name" "snapshots" "mountPath" "/snapshots" "readOnly" true))) | fromYaml -}}
{{- $spec := dict "nodeSelector" $t.nodeSelector "tolerations" $t.tolerations -}}
{{- with $t.runtimeClassName }}{{- $_ := set $spec "runtimeClassName" . }}{{- end }}
{{- if eq $t.mode "job" }}{{- $_ := set $spec "restartPolicy" "Never" }}{{- end }}
{{- mergeOverwrite $pod (dict "spec" $spec) (deepCopy $t.podTemplate) | toYaml }}
{{- end }}
