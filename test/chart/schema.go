package main

import (
	"encoding/json"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v4"
)

// valuesSchema makes the schema of the chart's values from its base, in which
// {crd: PATH} stands for what the resource's definition says at spec.PATH.
func valuesSchema(base, crd []byte) ([]byte, error) {
	var schema any
	if err := yaml.Unmarshal(base, &schema); err != nil {
		return nil, fmt.Errorf("the base of the values' schema: %w", err)
	}
	var definition struct {
		Spec struct {
			Versions []struct {
				Schema struct {
					OpenAPIV3Schema any `yaml:"openAPIV3Schema"`
				}
			}
		}
	}
	if err := yaml.Unmarshal(crd, &definition); err != nil {
		return nil, fmt.Errorf("the resource's definition: %w", err)
	}
	if len(definition.Spec.Versions) != 1 {
		return nil, fmt.Errorf("the resource's definition has %d versions, want 1", len(definition.Spec.Versions))
	}
	spec, err := at(definition.Spec.Versions[0].Schema.OpenAPIV3Schema, "spec")
	if err != nil {
		return nil, err
	}
	if err := fill(schema, spec); err != nil {
		return nil, err
	}
	data, err := json.MarshalIndent(schema, "", "  ")
	return append(data, '\n'), err
}

// fill puts parts of spec where node asks for them.
func fill(node, spec any) error {
	switch n := node.(type) {
	case map[string]any:
		for key, value := range n {
			ref, _ := value.(map[string]any)
			path, isRef := ref["crd"].(string)
			if !isRef || len(ref) != 1 {
				if err := fill(value, spec); err != nil {
					return err
				}
				continue
			}
			part, err := at(spec, path)
			if err != nil {
				return err
			}
			n[key] = strict(part)
		}
	case []any:
		for _, value := range n {
			if err := fill(value, spec); err != nil {
				return err
			}
		}
	}
	return nil
}

// at returns the schema of the field that path leads to.
func at(schema any, path string) (any, error) {
	for name := range strings.SplitSeq(path, ".") {
		object, _ := schema.(map[string]any)
		properties, _ := object["properties"].(map[string]any)
		var found bool
		if schema, found = properties[name]; !found {
			return nil, fmt.Errorf("the resource's definition has no %s (in %s)", name, path)
		}
	}
	return schema, nil
}

// strict is a part of an OpenAPI schema as JSON Schema, in which unknown keys
// are refused, as the API server does not.
func strict(node any) any {
	switch n := node.(type) {
	case map[string]any:
		out := map[string]any{}
		for key, value := range n {
			if key == "properties" {
				properties := map[string]any{}
				for name, property := range value.(map[string]any) {
					properties[name] = strict(property)
				}
				out[key] = properties
				out["additionalProperties"] = false
				continue
			}
			if key == "description" || key == "format" || strings.HasPrefix(key, "x-kubernetes-") {
				continue
			}
			out[key] = strict(value)
		}
		return out
	case []any:
		out := make([]any, len(n))
		for i, value := range n {
			out[i] = strict(value)
		}
		return out
	}
	return node
}
