package nodes

import (
	"os"
	"strings"
	"testing"

	"github.com/google/cel-go/cel"
	"go.yaml.in/yaml/v4"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	plugincel "k8s.io/apiserver/pkg/admission/plugin/cel"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/cel/environment"
)

// chart is what the chart makes of every one of its values.
const chart = "../chart/testdata/every-value.golden.yaml"

// policy is a ValidatingAdmissionPolicy.
type policy struct {
	Kind     string `yaml:"kind"`
	Metadata struct {
		Name string `yaml:"name"`
	} `yaml:"metadata"`
	Spec struct {
		Variables []struct {
			Name       string `yaml:"name"`
			Expression string `yaml:"expression"`
		} `yaml:"variables"`
		Validations []struct {
			Expression string `yaml:"expression"`
		} `yaml:"validations"`
	} `yaml:"spec"`
}

func findPolicy(t *testing.T, name string) policy {
	t.Helper()
	data, err := os.ReadFile(chart)
	if err != nil {
		t.Fatal(err)
	}
	for part := range strings.SplitSeq(string(data), "\n---\n") {
		var p policy
		if yaml.Unmarshal([]byte(part), &p) == nil && p.Kind == "ValidatingAdmissionPolicy" && strings.HasPrefix(p.Metadata.Name, name+".") {
			return p
		}
	}
	t.Fatalf("the chart has no policy %s", name)
	return policy{}
}

// expression is one of a policy's; only variables have names.
type expression struct{ name, text string }

func (e expression) GetExpression() string { return e.text }
func (e expression) GetName() string       { return e.name }

func (e expression) ReturnTypes() []*cel.Type {
	if e.name != "" {
		return []*cel.Type{cel.AnyType, cel.DynType}
	}
	return []*cel.Type{cel.BoolType}
}

// allows asks the API server's own evaluator whether the agent of node n1 may
// write object in place of old.
func (p policy) allows(t *testing.T, kind schema.GroupVersionKind, resource schema.GroupVersionResource, object, old runtime.Object) bool {
	t.Helper()
	compiler, err := plugincel.NewCompositedCompiler(environment.MustBaseEnvSet(environment.DefaultCompatibilityVersion()))
	if err != nil {
		t.Fatal(err)
	}
	var none plugincel.OptionalVariableDeclarations
	for _, v := range p.Spec.Variables {
		if r := compiler.CompileAndStoreVariable(expression{v.Name, v.Expression}, none, environment.StoredExpressions); r.Error != nil {
			t.Fatalf("variable %s: %v", v.Name, r.Error)
		}
	}
	var validations []plugincel.ExpressionAccessor
	for _, v := range p.Spec.Validations {
		validations = append(validations, expression{text: v.Expression})
	}
	condition := compiler.CompileCondition(validations, none, environment.StoredExpressions)
	if errs := condition.CompilationErrors(); len(errs) > 0 {
		t.Fatal(errs)
	}
	agent := &user.DefaultInfo{Extra: map[string][]string{"authentication.kubernetes.io/node-name": {"n1"}}}
	attributes := admission.NewAttributesRecord(object, old, kind, "", "", resource, "", admission.Update, nil, false, agent)
	versioned := &admission.VersionedAttributes{
		Attributes: attributes, VersionedKind: kind,
		VersionedObject: admission.NewLazyObject(object), VersionedOldObject: admission.NewLazyObject(old),
	}
	request := plugincel.CreateAdmissionRequest(attributes, metav1.GroupVersionResource(resource), metav1.GroupVersionKind(kind))
	results, _, err := condition.ForInput(t.Context(), versioned, request, plugincel.OptionalVariableBindings{}, nil, 1_000_000)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range results {
		if r.Error != nil {
			t.Fatalf("validation %d: %v", i, r.Error)
		}
		if r.EvalResult.Value() != true {
			return false
		}
	}
	return true
}

// TestTaintPolicy: an agent may take the startup taint from its own node, and
// nothing else.
func TestTaintPolicy(t *testing.T) {
	p := findPolicy(t, "connected-registry-agent-taint")
	ours := corev1.Taint{Key: "connectedregistry.io/not-ready", Effect: corev1.TaintEffectNoSchedule}
	other := corev1.Taint{Key: "example.com/other", Effect: corev1.TaintEffectNoSchedule}
	node := func(name string, change func(*corev1.Node), taints ...corev1.Taint) *corev1.Node {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"a": "b"}}, Spec: corev1.NodeSpec{Taints: taints}}
		if change != nil {
			change(n)
		}
		return n
	}
	cordoned := func(n *corev1.Node) { n.Spec.Unschedulable = true }
	for _, test := range []struct {
		name          string
		before, after *corev1.Node
		want          bool
	}{
		{"the startup taint", node("n1", nil, other, ours), node("n1", nil, other), true},
		{"the only taint", node("n1", nil, ours), node("n1", nil), true},
		{"of another node", node("n2", nil, ours), node("n2", nil), false},
		{"another taint too", node("n1", nil, ours, other), node("n1", nil), false},
		{"a new taint", node("n1", nil, ours), node("n1", nil, ours, other), false},
		{"a label", node("n1", nil, ours), node("n1", func(n *corev1.Node) { n.Labels["c"] = "d" }), false},
		{"an annotation", node("n1", nil, ours), node("n1", func(n *corev1.Node) { n.Annotations = map[string]string{"a": "b"} }), false},
		{"cordon", node("n1", nil, ours), node("n1", cordoned), false},
		{"uncordon", node("n1", cordoned, ours), node("n1", nil), false},
	} {
		got := p.allows(t, corev1.SchemeGroupVersion.WithKind("Node"), corev1.SchemeGroupVersion.WithResource("nodes"), test.after, test.before)
		if got != test.want {
			t.Errorf("%s: allowed %v, want %v", test.name, got, test.want)
		}
	}
}

// TestLeasePolicy: an agent writes its own node's Lease, and takes the turn to
// restart a runtime for its own node.
func TestLeasePolicy(t *testing.T) {
	p := findPolicy(t, "connected-registry-agent")
	for _, test := range []struct {
		name, holder string
		want         bool
	}{
		{"connected-registry-node-n1", "pod", true},
		{"connected-registry-node-n2", "pod", false},
		{"connected-registry-runtime", "n1", true},
		{"connected-registry-runtime", "n2", false},
		{"connected-registry-runtime", "", false},
		{"connected-registry-syncer", "n1", false},
	} {
		lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: test.name}}
		if test.holder != "" {
			lease.Spec.HolderIdentity = &test.holder
		}
		got := p.allows(t, coordinationv1.SchemeGroupVersion.WithKind("Lease"), coordinationv1.SchemeGroupVersion.WithResource("leases"), lease, lease)
		if got != test.want {
			t.Errorf("%s held by %q: allowed %v, want %v", test.name, test.holder, got, test.want)
		}
	}
}
