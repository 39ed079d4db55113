package daemon

import (
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
)

const testNamespace = "cr"

// api is an API server as far as agents need one, over real HTTP: lists and
// watches of Secrets by name, Leases, Events and Nodes. It can be away.
type api struct {
	server *httptest.Server
	decode runtime.Decoder

	mu      sync.Mutex // guards everything below
	away    bool
	version int
	secrets map[string]*corev1.Secret
	watches map[*watchStream]bool
	leases  map[string]*coordinationv1.Lease
	nodes   []corev1.Node
	denied  int // this many lists of nodes fail
	events  []*corev1.Event
	writes  int      // of Leases
	refused []string // requests that no role of an agent's would allow
}

type watchStream struct {
	name   string
	events chan metav1.WatchEvent
}

func newAPI(t *testing.T) *api {
	a := &api{
		decode:  serializer.NewCodecFactory(newScheme()).UniversalDeserializer(),
		version: 1,
		secrets: make(map[string]*corev1.Secret),
		watches: make(map[*watchStream]bool),
		leases:  make(map[string]*coordinationv1.Lease),
	}
	mux := http.NewServeMux()
	base := "/api/v1/namespaces/" + testNamespace
	leases := "/apis/coordination.k8s.io/v1/namespaces/" + testNamespace + "/leases"
	mux.HandleFunc("GET "+base+"/secrets", a.readSecret)
	mux.HandleFunc("POST "+base+"/secrets", a.createSecret)
	mux.HandleFunc("PATCH "+base+"/secrets/{name}", a.patchSecret)
	mux.HandleFunc("DELETE "+base+"/secrets/{name}", func(w http.ResponseWriter, r *http.Request) { a.setSecret(r.PathValue("name"), nil, nil) })
	mux.HandleFunc("POST "+base+"/events", a.createEvent)
	mux.HandleFunc("GET /api/v1/nodes", a.listNodes)
	mux.HandleFunc("GET "+leases, a.listLeases)
	mux.HandleFunc("POST "+leases, a.createLease)
	mux.HandleFunc("PATCH "+leases+"/{name}", a.patchLease)
	mux.HandleFunc("DELETE "+leases+"/{name}", a.deleteLease)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		a.refused = append(a.refused, r.Method+" "+r.URL.String())
		a.mu.Unlock()
		fail(w, http.StatusForbidden, metav1.StatusReasonForbidden)
	})
	a.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		away := a.away
		a.mu.Unlock()
		if away {
			fail(w, http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		a.dropWatches()
		a.server.Close()
		for _, r := range a.refused {
			t.Errorf("asked the API server for what its role does not allow: %s", r)
		}
	})
	return a
}

func (a *api) config() *rest.Config { return &rest.Config{Host: a.server.URL} }

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

func fail(w http.ResponseWriter, status int, reason metav1.StatusReason) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
		Status:   metav1.StatusFailure, Reason: reason, Code: int32(status),
	})
}

// setSecret creates, changes or (data nil) deletes a Secret.
func (a *api) setSecret(name string, data map[string][]byte, annotations map[string]string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.version++
	kind := "MODIFIED"
	switch old := a.secrets[name]; {
	case data == nil && annotations == nil:
		if old == nil {
			return
		}
		delete(a.secrets, name)
		a.tell(name, "DELETED", old)
		return
	case old == nil:
		kind = "ADDED"
	}
	a.secrets[name] = &corev1.Secret{
		TypeMeta:   metav1.TypeMeta{Kind: "Secret", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: testNamespace, Annotations: annotations, ResourceVersion: strconv.Itoa(a.version)},
		Data:       data,
	}
	a.tell(name, kind, a.secrets[name])
}

func (a *api) tell(name, kind string, s *corev1.Secret) {
	raw, _ := json.Marshal(s)
	for w := range a.watches {
		if w.name == name {
			w.events <- metav1.WatchEvent{Type: kind, Object: runtime.RawExtension{Raw: raw}}
		}
	}
}

func (a *api) setAway(away bool) {
	a.mu.Lock()
	a.away = away
	a.mu.Unlock()
	if away {
		a.dropWatches()
	}
}

func (a *api) dropWatches() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for w := range a.watches {
		close(w.events)
		delete(a.watches, w)
	}
}

// readSecret answers as a role with resourceNames makes the API server answer:
// only what is asked for by name.
func (a *api) readSecret(w http.ResponseWriter, r *http.Request) {
	name, ok := strings.CutPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name=")
	if !ok {
		a.mu.Lock()
		a.refused = append(a.refused, "Secrets without their name: "+r.URL.String())
		a.mu.Unlock()
		fail(w, http.StatusForbidden, metav1.StatusReasonForbidden)
		return
	}
	if r.URL.Query().Get("watch") == "" {
		a.mu.Lock()
		list := corev1.SecretList{TypeMeta: metav1.TypeMeta{Kind: "SecretList", APIVersion: "v1"}}
		list.ResourceVersion = strconv.Itoa(a.version)
		if s := a.secrets[name]; s != nil {
			list.Items = append(list.Items, *s)
		}
		a.mu.Unlock()
		answer(w, list)
		return
	}
	if r.URL.Query().Get("sendInitialEvents") != "" { // an older API server
		fail(w, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid)
		return
	}
	a.streamSecret(w, r, name)
}

func (a *api) streamSecret(w http.ResponseWriter, r *http.Request, name string) {
	stream := &watchStream{name: name, events: make(chan metav1.WatchEvent, 100)}
	a.mu.Lock()
	// What happened between list and watch.
	if s := a.secrets[name]; s != nil {
		if from, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion")); from < a.version {
			raw, _ := json.Marshal(s)
			stream.events <- metav1.WatchEvent{Type: "MODIFIED", Object: runtime.RawExtension{Raw: raw}}
		}
	}
	a.watches[stream] = true
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		delete(a.watches, stream)
		a.mu.Unlock()
	}()
	w.Header().Set("Content-Type", "application/json")
	w.(http.Flusher).Flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case e, ok := <-stream.events:
			if !ok {
				return
			}
			json.NewEncoder(w).Encode(e)
			w.(http.Flusher).Flush()
		}
	}
}

func (a *api) body(r *http.Request) runtime.Object {
	raw, _ := io.ReadAll(r.Body)
	object, _, err := a.decode.Decode(raw, nil, nil)
	if err != nil {
		panic(err)
	}
	return object
}

func (a *api) createSecret(w http.ResponseWriter, r *http.Request) {
	s := a.body(r).(*corev1.Secret)
	a.setSecret(s.Name, map[string][]byte{}, s.Annotations)
	answer(w, s)
}

func (a *api) patchSecret(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	patch, _ := io.ReadAll(r.Body)
	a.mu.Lock()
	old := a.secrets[name]
	a.mu.Unlock()
	if old == nil {
		fail(w, http.StatusNotFound, metav1.StatusReasonNotFound)
		return
	}
	next := &corev1.Secret{}
	merge(old, patch, next)
	if next.Annotations == nil {
		next.Annotations = map[string]string{}
	}
	a.setSecret(name, next.Data, next.Annotations)
	answer(w, next)
}

func merge(old any, patch []byte, into any) {
	raw, err := json.Marshal(old)
	if err == nil {
		raw, err = jsonpatch.MergePatch(raw, patch)
	}
	if err = errors.Join(err, json.Unmarshal(raw, into)); err != nil {
		panic(err)
	}
}

func (a *api) createEvent(w http.ResponseWriter, r *http.Request) {
	e := a.body(r).(*corev1.Event)
	a.mu.Lock()
	a.events = append(a.events, e)
	a.mu.Unlock()
	answer(w, e)
}

func (a *api) listNodes(w http.ResponseWriter, _ *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.denied--; a.denied >= 0 {
		fail(w, http.StatusInternalServerError, metav1.StatusReasonInternalError)
		return
	}
	answer(w, corev1.NodeList{TypeMeta: metav1.TypeMeta{Kind: "NodeList", APIVersion: "v1"}, Items: a.nodes})
}

func (a *api) listLeases(w http.ResponseWriter, _ *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := coordinationv1.LeaseList{TypeMeta: metav1.TypeMeta{Kind: "LeaseList", APIVersion: "coordination.k8s.io/v1"}}
	for _, l := range a.leases {
		list.Items = append(list.Items, *l)
	}
	answer(w, list)
}

func (a *api) createLease(w http.ResponseWriter, r *http.Request) {
	l := a.body(r).(*coordinationv1.Lease)
	a.mu.Lock()
	defer a.mu.Unlock()
	l.TypeMeta = metav1.TypeMeta{Kind: "Lease", APIVersion: "coordination.k8s.io/v1"}
	a.leases[l.Name] = l
	a.writes++
	answer(w, l)
}

func (a *api) patchLease(w http.ResponseWriter, r *http.Request) {
	patch, _ := io.ReadAll(r.Body)
	a.mu.Lock()
	defer a.mu.Unlock()
	old := a.leases[r.PathValue("name")]
	if old == nil {
		fail(w, http.StatusNotFound, metav1.StatusReasonNotFound)
		return
	}
	next := &coordinationv1.Lease{}
	merge(old, patch, next)
	a.leases[next.Name] = next
	a.writes++
	answer(w, next)
}

func (a *api) deleteLease(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.leases, r.PathValue("name"))
	answer(w, metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess})
}

// said is what the Lease of a node says; nil if there is none.
func (a *api) said(node string) map[string]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if l := a.leases[LeasePrefix+node]; l != nil {
		return maps.Clone(l.Annotations)
	}
	return nil
}

// raised are the Events' reasons.
func (a *api) raised() (reasons []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range a.events {
		reasons = append(reasons, e.InvolvedObject.Kind+"/"+e.InvolvedObject.Name+" "+e.Reason)
	}
	return reasons
}
