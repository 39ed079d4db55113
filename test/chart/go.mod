module github.com/connected-registry/connected-registry/test/chart

go 1.26.6

require go.yaml.in/yaml/v4 v4.0.0

require github.com/google/go-cmp v0.7.0
