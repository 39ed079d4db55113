package controller

import (
	"bytes"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	metadatafake "k8s.io/client-go/metadata/fake"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

func TestPeersAreGood(t *testing.T) {
	now := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	good, err := newPeers(now)
	if err != nil {
		t.Fatal(err)
	}
	other, err := newPeers(now)
	if err != nil {
		t.Fatal(err)
	}
	with := func(key string, value []byte) map[string][]byte {
		all := map[string][]byte{keyCA: good[keyCA], keyCertificate: good[keyCertificate], keyPrivate: good[keyPrivate]}
		all[key] = value
		return all
	}
	const day = 24 * time.Hour
	for _, test := range []struct {
		name string
		data map[string][]byte
		at   time.Time
		want bool
	}{
		{"new", good, now, true},
		{"of a year", good, now.Add(365 * day), true},
		{"less than a third left", good, now.Add(500 * day), false},
		{"another's CA", with(keyCA, other[keyCA]), now, false},
		{"another's key", with(keyPrivate, other[keyPrivate]), now, false},
		{"no CA", with(keyCA, nil), now, false},
		{"nothing", nil, now, false},
	} {
		if got := peersAreGood(test.data, test.at); got != test.want {
			t.Errorf("%s: %v", test.name, got)
		}
	}
}

// TestPeers turns peers on, renews their certificate, and turns them off.
func TestPeers(t *testing.T) {
	data := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, data, "  {}\n")
		api := w.config.Metadata.(*metadatafake.FakeMetadataClient)
		for _, name := range []string{"node-b", "node-a", "node-c"} {
			if err := api.Tracker().Create(nodes, nodeObject(name, nil), ""); err != nil {
				t.Fatal(err)
			}
		}
		renew := func(node, address string) {
			t.Helper()
			leases := w.kube.CoordinationV1().Leases("site")
			if _, err := leases.Update(t.Context(), agentLease(node, address, time.Now()), metav1.UpdateOptions{}); apierrors.IsNotFound(err) {
				_, err = leases.Create(t.Context(), agentLease(node, address, time.Now()), metav1.CreateOptions{})
				if err != nil {
					t.Fatal(err)
				}
			} else if err != nil {
				t.Fatal(err)
			}
		}
		renew("node-a", "192.0.2.1:5051")
		renew("node-b", "[2001:db8::2]:5051")
		renew("node-c", "")
		stop := w.run(w.config)
		time.Sleep(10 * time.Second)
		if w.secret(PeersSecret) != nil || len(w.told().Peers) > 0 {
			t.Error("on by default")
		}

		w.setSpec(`{"nodeCache": {"peers": true}}`)
		time.Sleep(resyncInterval + 10*time.Second)
		first := w.secret(PeersSecret)
		if first == nil || !peersAreGood(first.Data, time.Now()) || len(first.Data) != 3 || first.OwnerReferences[0].UID != "u-1" {
			t.Fatalf("Secret: %+v", first)
		}
		want := []v1alpha1.Peer{{Node: "node-a", Address: "192.0.2.1:5051"}, {Node: "node-b", Address: "[2001:db8::2]:5051"}}
		if diff := cmp.Diff(want, w.told().Peers); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}

		// One agent goes on, the other is gone.
		for range 3 {
			renew("node-a", "192.0.2.1:5051")
			time.Sleep(5 * time.Minute)
		}
		if diff := cmp.Diff(want[:1], w.told().Peers); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if diff := cmp.Diff(first, w.secret(PeersSecret)); diff != "" {
			t.Errorf("written again: %s", diff)
		}
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}

		time.Sleep(500 * 24 * time.Hour)
		stop = w.run(w.config)
		time.Sleep(10 * time.Second)
		if now := w.secret(PeersSecret); !peersAreGood(now.Data, time.Now()) || bytes.Equal(now.Data[keyCA], first.Data[keyCA]) {
			t.Error("not renewed")
		}
		w.setSpec(`{"nodeCache": {}}`)
		time.Sleep(resyncInterval + 10*time.Second)
		if w.secret(PeersSecret) != nil || len(w.told().Peers) > 0 {
			t.Error("it stays though peers are off")
		}
		// One of that name that is somebody else's.
		theirs := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "site", Name: PeersSecret}}
		if _, err := w.kube.CoreV1().Secrets("site").Create(t.Context(), theirs, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(resyncInterval + 10*time.Second)
		if w.secret(PeersSecret) == nil {
			t.Error("removed what is somebody else's")
		}
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}
