package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/connected-registry/connected-registry/agent"
	"github.com/connected-registry/connected-registry/trust"
)

func configured(t testing.TB, yaml string) *configuration {
	t.Helper()
	c, err := loadConfiguration("node.yaml", []byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const fullYAML = `apiVersion: connectedregistry.io/v1alpha1
kind: NodeConfiguration
registry: 10.96.0.50:443
names: [10.96.0.50, registry.example.com]
push: true
systemTrust: true
caSecrets:
- name: connected-registry-ca
- {name: also-own, hosts: [registry.example.com]}
- {name: b, hosts: [docker.io, harbor.example.com:8443, quay.io]}
- {name: c, hosts: ["harbor.example.com:8443"]}
- {name: missing, hosts: [nobody.example.com]}
mirrors:
- {registry: docker.io, server: "https://mirror.example.com", resolveTags: false}
- {registry: quay.io, fallback: false, server: "https://quay.io"}
`

// TestNodeConfig: which certificates are for whom.
func TestNodeConfig(t *testing.T) {
	var b []trust.Bundle
	for _, name := range []string{"own", "also", "b", "c"} {
		pem, _ := authority(t, name, time.Hour)
		b = append(b, bundle(t, pem))
	}
	c := configured(t, fullYAML)
	a := c.gather(map[string]trust.Bundle{"connected-registry-ca": b[0], "also-own": b[1], "b": b[2], "c": b[3], "unnamed": b[3]})
	got := c.nodeConfig(a, "http://127.0.0.1:5050")
	want := agent.Config{
		Tag:      c.digest,
		Registry: "10.96.0.50:443", Names: []string{"10.96.0.50", "registry.example.com"},
		CA: b[0].Union(b[1]), Push: true, CacheURL: "http://127.0.0.1:5050", SystemTrust: true,
		Mirrors: []agent.Mirror{
			{Registry: "docker.io", Server: "https://mirror.example.com", ServerCA: b[2], TagsUpstream: true},
			{Registry: "quay.io", NoFallback: true},
		},
		Trusted: []agent.Trusted{{Registry: "harbor.example.com:8443", CA: b[2].Union(b[3])}},
	}
	options := cmp.Options{cmp.Comparer(trust.Bundle.Equal), cmp.FilterPath(func(p cmp.Path) bool { return p.String() == "Report" }, cmp.Ignore())}
	if diff := cmp.Diff(want, got, options); diff != "" {
		t.Error(diff)
	}
	if _, err := agent.New(got); err != nil {
		t.Errorf("the agent would not take it: %v", err)
	}
	wantNotes := []string{
		"Secrets connected-registry-ca and also-own name different certificates for 10.96.0.50: all of them are trusted",
		"Secrets b and c name different certificates for harbor.example.com:8443: all of them are trusted",
	}
	if diff := cmp.Diff(wantNotes, a.notes); diff != "" {
		t.Error(diff)
	}
	// Without any certificate, nothing is put into the system's store.
	if none := c.nodeConfig(c.gather(nil), ""); none.SystemTrust || len(none.Trusted) > 0 {
		t.Errorf("without certificates: %+v", none)
	} else if _, err := agent.New(none); err != nil {
		t.Error(err)
	}
}

func TestConfigurationsThatMakeNoSense(t *testing.T) {
	_, key := authority(t, "x", time.Hour)
	for name, tt := range map[string]struct{ yaml, want string }{
		"empty":        {"", "node.yaml"},
		"not YAML":     {"{", "node.yaml"},
		"another kind": {strings.Replace(nodeYAML, "NodeConfiguration", "Secret", 1), "kind"},
		"host name":    {strings.Replace(nodeYAML, "docker.io", "../../etc", 1), "mirrors[0].registry"},
		"mirror's CA":  {strings.Replace(nodeYAML, "{registry: docker.io}", "{registry: docker.io, ca: "+strconv.Quote(string(key))+"}", 1), "private key"},
	} {
		_, err := loadConfiguration("node.yaml", []byte(tt.yaml))
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want one line with %q", name, err, tt.want)
		} else if strings.Contains(err.Error(), string(key[40:60])) {
			t.Errorf("%s: the error tells the key", name)
		}
	}
}

// TestSecretsOfNoUse: each is refused in words, and changes nothing.
func TestSecretsOfNoUse(t *testing.T) {
	good, key := authority(t, "good", time.Hour)
	other, _ := authority(t, "other", time.Hour)
	expired, _ := authority(t, "expired", -time.Minute)
	block, _ := x509DER(other)
	for name, tt := range map[string]struct {
		ca   []byte
		want string
	}{
		"no key ca.crt":           {nil, "no key ca.crt"},
		"empty":                   {[]byte{}, "no certificate"},
		"10 MB":                   {slices.Repeat(other, 10<<20/len(other)), "more than"},
		"key and certificate":     {slices.Concat(key, other), "private key"},
		"DER":                     {block, "not PEM"},
		"a thousand certificates": {slices.Repeat(other, 1000), "more than"},
		"expired":                 {expired, "expired"},
		"text":                    {slices.Concat([]byte("hello\n"), other), "not PEM"},
	} {
		s := source{}
		s.take(seen{present: true, ca: good}, time.Now(), time.Hour)
		s.take(seen{present: true, ca: tt.ca}, time.Now(), time.Hour)
		if !s.refused || !strings.Contains(s.fault, tt.want) || !s.bundle.Equal(bundle(t, good)) || strings.Contains(s.fault, "\n") {
			t.Errorf("%s: fault %q, bundle of %d", name, s.fault, s.bundle.Len())
		}
		if strings.Contains(s.fault, string(key[40:60])) {
			t.Errorf("%s: the fault tells the key", name)
		}
	}
	s := source{}
	crlf := []byte(strings.ReplaceAll(string(good), "\n", "\r\n"))
	if s.take(seen{present: true, ca: crlf}, time.Now(), time.Hour); s.fault != "" || !s.bundle.Equal(bundle(t, good)) {
		t.Errorf("CRLF: %q", s.fault)
	}
}

func x509DER(cert []byte) ([]byte, error) {
	b, _, err := trust.ParseBundle(cert, time.Now())
	return b.Certificates()[0].Raw, err
}

func TestSourceAges(t *testing.T) {
	short, _ := authority(t, "short", time.Minute)
	long, _ := authority(t, "long", time.Hour)
	now := time.Now()
	s := source{}
	s.take(seen{present: true, ca: slices.Concat(short, long)}, now, 10*time.Minute)
	s.age(now)
	if s.bundle.Len() != 2 {
		t.Fatalf("%d certificates", s.bundle.Len())
	}
	now = now.Add(2 * time.Minute)
	if s.age(now); !s.bundle.Equal(bundle(t, long)) || len(s.notes) != 1 {
		t.Errorf("expired: %d certificates, %q", s.bundle.Len(), s.notes)
	}
	s.take(seen{}, now, 10*time.Minute)
	s.take(seen{}, now.Add(9*time.Minute), 10*time.Minute) // the watch begins anew
	if s.age(now.Add(9 * time.Minute)); s.bundle.Empty() || s.fault == "" {
		t.Errorf("deleted: %q", s.fault)
	}
	if s.age(now.Add(10 * time.Minute)); !s.bundle.Empty() || !s.lapsed {
		t.Error("the certificates of a deleted Secret stay for ever")
	}
	// The last certificate stays though it has expired: it is no worse than none.
	s.take(seen{present: true, ca: long}, now, time.Minute)
	if s.age(now.Add(2 * time.Hour)); s.bundle.Empty() {
		t.Error("the last certificate went")
	}
}

// TestKeepKilledAtEveryStep: what is found afterwards is good, and the next
// save and removal end as ever.
func TestKeepKilledAtEveryStep(t *testing.T) {
	a, _ := authority(t, "a", time.Hour)
	b, _ := authority(t, "b", time.Hour)
	before := configured(t, fullYAML)
	after := configured(t, nodeYAML)
	oldBundles := map[string]trust.Bundle{"connected-registry-ca": bundle(t, a), "b": bundle(t, a), "c": bundle(t, b)}
	newBundles := map[string]trust.Bundle{"connected-registry-ca": bundle(t, b)}
	type killed struct{}
	attempt := func(k *keep, step int, do func(*keep) error) (dead bool) {
		defer func() {
			k.before = nil
			if r := recover(); r != nil {
				_, dead = r.(killed)
				if !dead {
					panic(r)
				}
			}
		}()
		k.before = func() {
			if step--; step < 0 {
				panic(killed{})
			}
		}
		if err := do(k); err != nil {
			t.Fatal(err)
		}
		return false
	}
	for name, do := range map[string]func(*keep) error{
		"save":   func(k *keep) error { return k.save(after, newBundles, newBundles["connected-registry-ca"]) },
		"remove": func(k *keep) error { return k.remove() },
	} {
		for step, dead := 0, true; dead; step++ {
			root := t.TempDir()
			k, err := openKeep(root)
			if err != nil {
				t.Fatal(err)
			}
			if err := k.save(before, oldBundles, oldBundles["connected-registry-ca"]); err != nil {
				t.Fatal(err)
			}
			// A writer that was killed in the middle of a file.
			if err := os.WriteFile(filepath.Join(k.path, keptOf, ".connected-registry-tmp-x"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			dead = attempt(k, step, do)
			config, bundles, err := k.load(time.Now())
			if err != nil {
				t.Errorf("%s killed at step %d: %v", name, step, err)
			}
			if config == nil && name == "save" {
				t.Errorf("%s killed at step %d: nothing is left", name, step)
			}
			for secret, have := range bundles {
				if !have.Equal(oldBundles[secret]) && !have.Equal(newBundles[secret]) {
					t.Errorf("%s killed at step %d: Secret %s is neither old nor new", name, step, secret)
				}
			}
			if err := k.save(after, newBundles, newBundles["connected-registry-ca"]); err != nil {
				t.Fatal(err)
			}
			config, bundles, err = k.load(time.Now())
			if err != nil || config.digest != after.digest || len(bundles) != 1 || !bundles["connected-registry-ca"].Equal(newBundles["connected-registry-ca"]) {
				t.Errorf("%s killed at step %d, then saved: %v, %v", name, step, bundles, err)
			}
			if left, _ := filepath.Glob(filepath.Join(k.path, keptOf, "*")); len(left) != 1 {
				t.Errorf("%s killed at step %d, then saved: left %v", name, step, left)
			}
			if err := k.remove(); err != nil {
				t.Error(err)
			}
			k.removeStateDir()
			if _, err := os.Stat(filepath.Join(root, stateDir)); !os.IsNotExist(err) {
				t.Errorf("%s killed at step %d: not all is removed: %v", name, step, err)
			}
			k.close()
		}
	}
}

// TestKeepDamaged: what the disk spoilt is told and passed over.
func TestKeepDamaged(t *testing.T) {
	a, _ := authority(t, "a", time.Hour)
	k, err := openKeep(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer k.close()
	if config, _, err := k.load(time.Now()); config != nil || err != nil {
		t.Errorf("nothing kept: %v, %v", config, err)
	}
	bundles := map[string]trust.Bundle{ControlSecret: bundle(t, a)}
	if err := k.save(configured(t, nodeYAML), bundles, bundle(t, a)); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{keptOf + "/" + ControlSecret, keptConfig} {
		if err := os.WriteFile(filepath.Join(k.path, file), []byte("\x00\x00"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, bundles, err := k.load(time.Now()); err == nil || len(bundles) > 0 {
			t.Errorf("%s damaged: %v, %v", file, bundles, err)
		}
	}
}

// TestLeaseWrites: one write for a burst, one in five minutes without, and none
// but a few while the API server is away.
func TestLeaseWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var written []string
		var failure error
		l := newLeaser(lease{}, func(error) {}, slog.New(slog.DiscardHandler))
		l.write = func(_ context.Context, annotations map[string]string) error {
			mu.Lock()
			defer mu.Unlock()
			if failure == nil {
				written = append(written, annotations["x"])
			} else {
				written = append(written, "failed")
			}
			return failure
		}
		take := func() []string {
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			out := written
			written = nil
			return out
		}
		set := func(x string) { l.set(map[string]string{"x": x}) }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { l.run(ctx); close(done) }()

		set("1")
		if diff := cmp.Diff([]string{"1"}, take()); diff != "" {
			t.Error(diff)
		}
		set("2")
		set("3")
		set("3")
		time.Sleep(2 * coalesceTime)
		if diff := cmp.Diff([]string{"3"}, take()); diff != "" {
			t.Error(diff)
		}
		time.Sleep(time.Hour)
		if n := len(take()); n < 12 || n > 15 {
			t.Errorf("%d renewals in an hour", n)
		}
		mu.Lock()
		failure = errors.New("away")
		mu.Unlock()
		set("4")
		time.Sleep(time.Hour)
		if n := len(take()); n < 60 || n > 90 {
			t.Errorf("%d attempts in an hour", n)
		}
		mu.Lock()
		failure = nil
		mu.Unlock()
		time.Sleep(longWriteRetry)
		if diff := cmp.Diff([]string{"4"}, take()); diff != "" {
			t.Error(diff)
		}
		// Having left, it is not renewed: somebody is about to delete it.
		l.set(map[string]string{"x": "5", AnnotationCleaned: "true"})
		time.Sleep(time.Hour)
		if diff := cmp.Diff([]string{"5"}, take()); diff != "" {
			t.Error(diff)
		}
		cancel()
		<-done
	})
}

// TestFollowFile: the way in which the kubelet changes a mounted ConfigMap.
func TestFollowFile(t *testing.T) {
	s := &site{t: t, mount: t.TempDir()}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	got := make(chan string, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		followFile(ctx, filepath.Join(s.mount, "node.yaml"), func(raw []byte, err error) { got <- string(raw) + text(err) })
	}()
	if first := <-got; !strings.Contains(first, "not there yet") {
		t.Errorf("first: %q", first)
	}
	for _, content := range []string{"one", "two", strings.Repeat("x", maxConfigBytes+1), "three"} {
		s.mounted(content)
		want := content
		if len(content) > maxConfigBytes {
			want = "more than"
		}
		timeout := time.After(lookInterval - time.Second) // sooner than by looking
		for seen := ""; !strings.Contains(seen, want); {
			select {
			case seen = <-got:
			case <-timeout:
				t.Fatalf("%.10q was not noticed", content)
			}
		}
	}
	cancel()
	<-done
}

func TestNotCleaned(t *testing.T) {
	now := time.Now()
	lease := func(node string, renewed time.Duration, cleaned string) coordinationv1.Lease {
		at := metav1.NewMicroTime(now.Add(-renewed))
		return coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Name: LeasePrefix + node, Annotations: map[string]string{AnnotationCleaned: cleaned}},
			Spec:       coordinationv1.LeaseSpec{RenewTime: &at},
		}
	}
	awaited, away := notCleaned([]coordinationv1.Lease{
		lease("b", 0, ""), lease("a", 0, ""), lease("clean", 0, "true"), lease("silent", time.Hour, ""),
		lease("down", 0, ""), lease("gone", 0, ""), {ObjectMeta: metav1.ObjectMeta{Name: "another"}},
	}, map[string]bool{"a": true, "b": true, "clean": true, "silent": true, "down": false}, now)
	if diff := cmp.Diff([][]string{{"a", "b"}, {"silent", "down"}}, [][]string{awaited, away}); diff != "" {
		t.Error(diff)
	}
}

func readyNode(name string, status corev1.ConditionStatus) corev1.Node {
	return corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Status:     corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}},
	}
}

// TestUninstall: the whole conversation of hook and agent.
func TestUninstall(t *testing.T) {
	s := newSite(t)
	pristine := s.files()
	a, _ := authority(t, "a", time.Hour)
	s.nodes = []corev1.Node{readyNode(testNode, corev1.ConditionTrue), readyNode("down", corev1.ConditionFalse)}
	s.denied = 1 // what is not known is not taken for clean
	s.leases[LeasePrefix+"down"] = &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: LeasePrefix + "down"}}
	s.mounted(nodeYAML)
	s.setSecret(ControlSecret, secretOf(a), nil)
	s.start()
	s.trusts("docker.io", a)
	hook := UninstallConfig{API: s.config(), Namespace: testNamespace, Timeout: time.Minute}
	silent, err := Uninstall(t.Context(), hook)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"down"}, silent); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(pristine, s.files()); diff != "" {
		t.Errorf("left behind: %s", diff)
	}
	if s.said(testNode) != nil || s.said("down") != nil {
		t.Error("Leases are left")
	}
	if err := CancelUninstall(t.Context(), hook); err != nil {
		t.Fatal(err)
	}
	s.trusts("docker.io", a)
}

// TestUninstallWithoutCA: the Secret by which agents are told is made, and goes.
func TestUninstallWithoutCA(t *testing.T) {
	s := newSite(t)
	s.nodes = []corev1.Node{readyNode(testNode, corev1.ConditionTrue)}
	s.mounted(strings.Replace(nodeYAML, "caSecrets", "#", 1))
	pristine := s.files()
	s.start()
	s.eventually("ready", func() bool { return s.ready() == "ok" })
	s.eventually("Lease", func() bool { return s.said(testNode)[AnnotationConfiguration] != "" })
	silent, err := Uninstall(t.Context(), UninstallConfig{API: s.config(), Namespace: testNamespace, Timeout: time.Minute})
	if err != nil || len(silent) > 0 {
		t.Errorf("silent %v, %v", silent, err)
	}
	s.stop()
	if diff := cmp.Diff(pristine, s.files()); diff != "" {
		t.Errorf("left behind: %s", diff)
	}
	if len(s.secrets) > 0 {
		t.Error("the Secret is left")
	}
}

// TestUninstallTimesOut: a node that does not answer is named.
func TestUninstallTimesOut(t *testing.T) {
	a := newAPI(t)
	a.nodes = []corev1.Node{readyNode(testNode, corev1.ConditionTrue)}
	now := metav1.NowMicro()
	a.leases[LeasePrefix+testNode] = &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: LeasePrefix + testNode}, Spec: coordinationv1.LeaseSpec{RenewTime: &now}}
	silent, err := Uninstall(t.Context(), UninstallConfig{API: a.config(), Namespace: testNamespace, Timeout: time.Nanosecond})
	if diff := cmp.Diff([]string{testNode}, silent); diff != "" || err != nil {
		t.Errorf("%s, %v", diff, err)
	}
}

func TestOnceAndCleanup(t *testing.T) {
	root, dir := t.TempDir(), t.TempDir()
	a, _ := authority(t, "a", time.Hour)
	b, _ := authority(t, "b", time.Hour)
	for name, data := range map[string][]byte{"node.yaml": []byte(nodeYAML), "a.crt": a, "b.crt": b} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg := OnceConfig{File: filepath.Join(dir, "node.yaml"), NodeRoot: root, Logger: slog.New(slog.DiscardHandler)}
	if _, err := Once(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "--ca") {
		t.Errorf("without its CA: %v", err)
	}
	cfg.CAs = []string{filepath.Join(dir, "a.crt"), filepath.Join(dir, "b.crt")}
	changed, err := Once(t.Context(), cfg)
	if err != nil || len(changed) != 6 {
		t.Errorf("changed %v, %v", changed, err)
	}
	got, err := os.ReadFile(filepath.Join(root, certs, "docker.io/ca.crt"))
	if err != nil || string(got) != string(bundle(t, a, b).PEM()) {
		t.Errorf("CA: %v", err)
	}
	cache := filepath.Join(root, CacheDir)
	if err := os.MkdirAll(cache, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cache, "lock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Cleanup(t.Context(), agent.CleanupConfig{NodeRoot: root}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(cache); err != nil {
		t.Errorf("the cache went too: %v", err)
	}
	if err := RemoveCache(root, cache); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, stateDir)); !os.IsNotExist(err) {
		t.Errorf("left behind: %v", err)
	}
}
