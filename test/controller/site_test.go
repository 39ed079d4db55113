package controller_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	parentregistry "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// resources is the kind under test.
var resources = schema.GroupVersionResource{Group: v1alpha1.Group, Version: v1alpha1.Version, Resource: "connectedregistries"}

// site is a namespace with a parent and room for syncers.
type site struct {
	t         *testing.T
	namespace string
	data      string
	parent    *parent
}

// newSite makes a namespace with the replicas' Service. It goes with the test.
func newSite(t *testing.T) *site {
	t.Helper()
	ns, err := kube.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "site-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, namespace: ns.Name, data: t.TempDir(), parent: newParent(t)}
	t.Cleanup(func() {
		_ = kube.CoreV1().Namespaces().Delete(context.WithoutCancel(t.Context()), ns.Name, metav1.DeleteOptions{})
	})
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "connected-registry"},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app.kubernetes.io/name": "connected-registry"},
			Ports:    []corev1.ServicePort{{Name: "https", Port: 443}},
		},
	}
	if _, err := kube.CoreV1().Services(s.namespace).Create(t.Context(), service, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) resource() dynamic.ResourceInterface {
	return objects.Resource(resources).Namespace(s.namespace)
}

// object is a resource with a spec in JSON.
func (s *site) object(spec string) *unstructured.Unstructured {
	s.t.Helper()
	var parsed map[string]any
	if err := json.Unmarshal([]byte(spec), &parsed); err != nil {
		s.t.Fatal(err)
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": v1alpha1.APIVersion, "kind": v1alpha1.Kind,
		"metadata": map[string]any{"name": "connected-registry"}, "spec": parsed,
	}}
}

func (s *site) create(spec string) {
	s.t.Helper()
	if _, err := s.resource().Create(s.t.Context(), s.object(spec), metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// patch merges JSON into the resource.
func (s *site) patch(merge string) {
	s.t.Helper()
	if _, err := s.resource().Patch(s.t.Context(), "connected-registry", "application/merge-patch+json", []byte(merge), metav1.PatchOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) secret(name string, data map[string]string) {
	s.t.Helper()
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, StringData: data}
	if _, err := kube.CoreV1().Secrets(s.namespace).Create(s.t.Context(), secret, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) status() v1alpha1.Status {
	s.t.Helper()
	object, err := s.resource().Get(s.t.Context(), "connected-registry", metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	var cr v1alpha1.ConnectedRegistry
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, &cr); err != nil {
		s.t.Fatal(err)
	}
	return cr.Status
}

// await returns when the status is as it should be.
func (s *site) await(what string, ok func(v1alpha1.Status) bool) v1alpha1.Status {
	s.t.Helper()
	var status v1alpha1.Status
	eventually(s.t, what, func() bool {
		status = s.status()
		return ok(status)
	}, func() string {
		text, _ := json.MarshalIndent(status, "", " ")
		return string(text)
	})
	return status
}

// holder is who leads; empty: nobody.
func (s *site) holder() string {
	s.t.Helper()
	lease, err := kube.CoordinationV1().Leases(s.namespace).Get(s.t.Context(), "connected-registry-syncer", metav1.GetOptions{})
	if err != nil || lease.Spec.HolderIdentity == nil {
		return ""
	}
	return *lease.Spec.HolderIdentity
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool, more func() string) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s\n%s", what, more())
		}
	}
}

// process is a command of the program that runs.
type process struct {
	*exec.Cmd
	name   string
	gate   *gate
	exited chan struct{}
	log    *syncBuffer
}

// syncer starts the command syncer, which may do everything. It reaches the API
// server through a gate.
func (s *site) syncer(name string) *process {
	s.t.Helper()
	tls := kubeConfig.TLSClientConfig
	return s.syncerAs(name, &clientcmdapi.AuthInfo{
		ClientCertificateData: tls.CertData, ClientCertificate: tls.CertFile, ClientKeyData: tls.KeyData, ClientKey: tls.KeyFile,
	})
}

func (s *site) syncerAs(name string, user *clientcmdapi.AuthInfo) *process {
	s.t.Helper()
	g := newGate(s.t, kubeConfig.Host)
	return s.start(name, g, []string{"KUBECONFIG=" + g.kubeconfig(s.t, user)},
		"syncer", "--namespace", s.namespace, "--data", s.data, "--identity", name, "--health-listen", "127.0.0.1:0", "--verbose")
}

func (s *site) start(name string, g *gate, env []string, args ...string) *process {
	s.t.Helper()
	p := &process{Cmd: exec.Command(program, args...), name: name, gate: g, exited: make(chan struct{}), log: new(syncBuffer)}
	p.Env = append(os.Environ(), env...)
	p.Stdout, p.Stderr = p.log, p.log
	if err := p.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		_ = p.Wait() // ProcessState tells
		close(p.exited)
	}()
	s.t.Cleanup(func() {
		_ = p.Process.Signal(syscall.SIGCONT)
		_ = p.Process.Kill()
		<-p.exited
		if s.t.Failed() {
			s.t.Logf("%s:\n%s", name, p.log)
		}
	})
	return p
}

// terminate ends a process as the kubelet does, and returns its exit code.
func (p *process) terminate(t *testing.T) int {
	t.Helper()
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	return p.wait(t)
}

func (p *process) wait(t *testing.T) int {
	t.Helper()
	select {
	case <-p.exited:
		return p.ProcessState.ExitCode()
	case <-time.After(patience):
		t.Fatalf("%s does not end\n%s", p.name, p.log)
		return 0
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// gate is a way to the API server that can be closed.
type gate struct {
	listener net.Listener
	target   string

	mu     sync.Mutex
	closed bool
	conns  map[net.Conn]bool
}

func newGate(t *testing.T, server string) *gate {
	t.Helper()
	u, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{listener: l, target: u.Host, conns: make(map[net.Conn]bool)}
	t.Cleanup(func() {
		l.Close()
		g.shut()
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go g.carry(c)
		}
	}()
	return g
}

func (g *gate) carry(c net.Conn) {
	defer c.Close()
	up, err := net.Dial("tcp", g.target)
	if err != nil {
		return
	}
	defer up.Close()
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return
	}
	g.conns[c], g.conns[up] = true, true
	g.mu.Unlock()
	go func() {
		_, _ = io.Copy(up, c)
		up.Close()
	}()
	_, _ = io.Copy(c, up)
}

// shut cuts all connections and lets no more through.
func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for c := range g.conns {
		c.Close()
	}
}

// kubeconfig is a file that leads through the gate.
func (g *gate) kubeconfig(t *testing.T, user *clientcmdapi.AuthInfo) string {
	t.Helper()
	tls := kubeConfig.TLSClientConfig
	config := clientcmdapi.NewConfig()
	config.Clusters["c"] = &clientcmdapi.Cluster{
		Server: "https://" + g.listener.Addr().String(), CertificateAuthorityData: tls.CAData, CertificateAuthority: tls.CAFile,
	}
	config.AuthInfos["u"] = user
	config.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	config.CurrentContext = "x"
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// parent is a registry whose blobs can be made to come slowly.
type parent struct {
	host string

	mu   sync.Mutex
	slow bool
	down bool
}

func newParent(t *testing.T) *parent {
	t.Helper()
	p := &parent{}
	registry := parentregistry.New(parentregistry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		slow, down := p.state()
		switch {
		case down:
			panic(http.ErrAbortHandler)
		case slow && r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/"):
			registry.ServeHTTP(&slowWriter{ResponseWriter: w, parent: p, request: r}, r)
		default:
			registry.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(func() {
		p.set(false, false)
		server.CloseClientConnections()
		server.Close()
	})
	p.host = strings.TrimPrefix(server.URL, "http://")
	return p
}

func (p *parent) state() (slow, down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.slow, p.down
}

func (p *parent) set(slow, down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.slow, p.down = slow, down
}

// push puts an image of random layers there.
func (p *parent) push(t *testing.T, reference string, size int64, layers int64) {
	t.Helper()
	image, err := random.Image(size, layers)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(p.host+"/"+reference, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, image); err != nil {
		t.Fatal(err)
	}
}

// slowWriter sends a body in small pieces, for as long as the parent is slow.
type slowWriter struct {
	http.ResponseWriter
	parent  *parent
	request *http.Request
}

func (w *slowWriter) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		piece := min(len(p), 16<<10)
		m, err := w.ResponseWriter.Write(p[:piece])
		n += m
		if err != nil {
			return n, err
		}
		w.ResponseWriter.(http.Flusher).Flush()
		p = p[piece:]
		if slow, _ := w.parent.state(); slow {
			select {
			case <-w.request.Context().Done():
				return n, fmt.Errorf("the client is gone: %w", context.Cause(w.request.Context()))
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
	return n, nil
}
