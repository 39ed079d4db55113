package daemon

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
)

// objects is an API server for single objects, which lets one writer win.
type objects struct {
	server *httptest.Server
	decode runtime.Decoder

	mu      sync.Mutex // guards what follows
	lease   *coordinationv1.Lease
	node    *corev1.Node
	version int
	// beforePatch, if set, happens once ahead of a patch.
	beforePatch func()
}

func newObjects(t *testing.T) *objects {
	o := &objects{decode: serializer.NewCodecFactory(newScheme()).UniversalDeserializer()}
	leases := "/apis/coordination.k8s.io/v1/namespaces/" + testNamespace + "/leases"
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+leases+"/"+TurnLease, o.locked(o.getLease))
	mux.HandleFunc("POST "+leases, o.locked(o.putLease))
	mux.HandleFunc("PUT "+leases+"/"+TurnLease, o.locked(o.putLease))
	mux.HandleFunc("GET /api/v1/nodes/n1", o.locked(func(w http.ResponseWriter, _ *http.Request) { answer(w, o.node) }))
	mux.HandleFunc("PATCH /api/v1/nodes/n1", o.locked(o.patchNode))
	o.server = httptest.NewServer(mux)
	t.Cleanup(o.server.Close)
	return o
}

func (o *objects) locked(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		o.mu.Lock()
		defer o.mu.Unlock()
		h(w, r)
	}
}

func (o *objects) client(t *testing.T) *client {
	t.Helper()
	c, err := newClient(&rest.Config{Host: o.server.URL, QPS: -1}, testNamespace)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (o *objects) getLease(w http.ResponseWriter, _ *http.Request) {
	if o.lease == nil {
		fail(w, http.StatusNotFound, metav1.StatusReasonNotFound)
		return
	}
	answer(w, o.lease)
}

func (o *objects) putLease(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		fail(w, http.StatusBadRequest, metav1.StatusReasonBadRequest)
		return
	}
	decoded, _, err := o.decode.Decode(body, nil, nil)
	lease, ok := decoded.(*coordinationv1.Lease)
	switch {
	case err != nil || !ok:
		fail(w, http.StatusBadRequest, metav1.StatusReasonBadRequest)
		return
	case r.Method == http.MethodPost && o.lease != nil:
		fail(w, http.StatusConflict, metav1.StatusReasonAlreadyExists)
		return
	case r.Method == http.MethodPut && lease.ResourceVersion != o.lease.ResourceVersion:
		fail(w, http.StatusConflict, metav1.StatusReasonConflict)
		return
	}
	o.version++
	lease.ResourceVersion = strconv.Itoa(o.version)
	lease.TypeMeta = metav1.TypeMeta{APIVersion: "coordination.k8s.io/v1", Kind: "Lease"}
	o.lease = lease
	answer(w, lease)
}

func (o *objects) patchNode(w http.ResponseWriter, r *http.Request) {
	if o.beforePatch != nil {
		o.beforePatch()
		o.beforePatch = nil
	}
	body, _ := io.ReadAll(r.Body)
	patch, err := jsonpatch.DecodePatch(body)
	if err == nil && r.Header.Get("Content-Type") != "application/json-patch+json" {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		fail(w, http.StatusBadRequest, metav1.StatusReasonBadRequest)
		return
	}
	old, _ := json.Marshal(o.node)
	changed, err := patch.Apply(old)
	if err != nil {
		fail(w, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid)
		return
	}
	o.node = &corev1.Node{}
	if err := json.Unmarshal(changed, o.node); err != nil {
		fail(w, http.StatusInternalServerError, metav1.StatusReasonInternalError)
		return
	}
	answer(w, o.node)
}

// TestTakeTurn: of many nodes that want their turn at once, one has it at a
// time, and each comes to it.
func TestTakeTurn(t *testing.T) {
	o := newObjects(t)
	var holders, turns atomic.Int64
	var wg sync.WaitGroup
	for i := range 3 {
		c := o.client(t)
		wg.Go(func() {
			unlock, err := c.takeTurn(t.Context(), "n"+strconv.Itoa(i))
			if err != nil {
				t.Error(err)
				return
			}
			if holders.Add(1) > 1 {
				t.Error("two nodes at once")
			}
			turns.Add(1)
			time.Sleep(10 * time.Millisecond)
			holders.Add(-1)
			unlock()
		})
	}
	wg.Wait()
	if turns.Load() != 3 {
		t.Errorf("%d turns, want 3", turns.Load())
	}
	unlock, err := o.client(t).takeTurn(t.Context(), "n0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := o.client(t).takeTurn(ctx, "n1"); err == nil {
		t.Error("a turn although n0 has it")
	}
	unlock()
}

// TestRemoveTaint: that taint goes, the others stay, also when somebody changes
// the list meanwhile.
func TestRemoveTaint(t *testing.T) {
	o := newObjects(t)
	ours := corev1.Taint{Key: StartupTaint, Effect: corev1.TaintEffectNoSchedule}
	evict := corev1.Taint{Key: StartupTaint, Effect: corev1.TaintEffectNoExecute}
	other := corev1.Taint{Key: "example.com/other", Effect: corev1.TaintEffectNoSchedule}
	o.node = &corev1.Node{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{Name: "n1"},
		Spec:       corev1.NodeSpec{Taints: []corev1.Taint{other, ours, evict}},
	}
	o.beforePatch = func() { o.node.Spec.Taints = []corev1.Taint{ours, other, evict} }
	c := o.client(t)
	if _, err := c.removeTaint(t.Context(), "n1"); err == nil || !strings.Contains(err.Error(), StartupTaint) {
		t.Errorf("error %v, want that the list was changed", err)
	}
	if len(o.node.Spec.Taints) != 3 {
		t.Fatalf("another taint went: %v", o.node.Spec.Taints)
	}
	if removed, err := c.removeTaint(t.Context(), "n1"); err != nil || !removed {
		t.Fatal(removed, err)
	}
	if len(o.node.Spec.Taints) != 1 || o.node.Spec.Taints[0].Key != other.Key {
		t.Errorf("left: %v", o.node.Spec.Taints)
	}
	if removed, err := c.removeTaint(t.Context(), "n1"); err != nil || removed {
		t.Errorf("again: %v, %v", removed, err)
	}
}
