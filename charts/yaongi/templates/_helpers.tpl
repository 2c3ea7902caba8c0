{{/* Labels of every object. */}}
{{- define "yaongi.labels" -}}
app.kubernetes.io/part-of: yaongi
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* One object: (list root object changes). The changes win over the object, the release's labels over both. */}}
{{- define "yaongi.object" -}}
{{- $root := index . 0 -}}
{{- $object := mustMergeOverwrite (deepCopy (index . 1)) (index . 2) -}}
{{- $labels := mustMergeOverwrite ($object.metadata.labels | default dict) (include "yaongi.labels" $root | fromYaml) -}}
{{- $metadata := mustMergeOverwrite $object.metadata (dict "labels" $labels) -}}
---
{{ toYaml $object }}
{{ end }}

{{/* The same for an object of the release's namespace. */}}
{{- define "yaongi.namespaced" -}}
{{- $namespace := dict "metadata" (dict "namespace" (index . 0).Release.Namespace) -}}
{{- include "yaongi.object" (list (index . 0) (index . 1) (mustMergeOverwrite $namespace (index . 2))) -}}
{{- end }}

{{/* The objects of a generated file, as {items: [...]}: (list root file). */}}
{{- define "yaongi.file" -}}
items:
{{ (index . 0).Files.Get (printf "files/%s.yaml" (index . 1)) }}
{{- end }}

{{/* The same objects if the switch is on and their API exists, else none. The first object's API counts, or one of the
older versions of it: (list root file switch needed [older]). */}}
{{- define "yaongi.optional" -}}
{{- $root := index . 0 -}}
{{- $field := index . 2 -}}
{{- $switch := $root.Values -}}
{{- range splitList "." $field }}{{ $switch = index $switch . }}{{ end -}}
{{- $file := include "yaongi.file" . -}}
{{- $first := first (fromYaml $file).items -}}
{{- $api := printf "%s/%s" $first.apiVersion $first.kind -}}
{{- $there := $root.Capabilities.APIVersions.Has $api -}}
{{- range slice . 4 -}}
{{- $older := printf "%s/%s" (dir $first.apiVersion) . -}}
{{- if and (not $there) ($root.Capabilities.APIVersions.Has (printf "%s/%s" $older $first.kind)) -}}
{{- $there = true -}}
{{- $file = replace $first.apiVersion $older $file -}}
{{- end -}}
{{- end -}}
{{- if and (eq (toString $switch) "true") (not $there) -}}
{{- fail (printf "%s is true, but the cluster has no %s; install %s, or set it to auto or false" $field $api (index . 3)) -}}
{{- end -}}
{{- if and $there (ne (toString $switch) "false") }}{{ $file }}{{ else }}items: []{{ end -}}
{{- end }}
