package clients

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"io"
	"path/filepath"
	"slices"
	"testing"

	helm "helm.sh/helm/v4/pkg/registry"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// TestHelm logs in, pushes two versions of a chart, lists and pulls them.
func TestHelm(t *testing.T) {
	data := t.TempDir()
	t.Run("read and write", func(t *testing.T) {
		s := newSite(t, data, v1alpha1.ModeReadWrite)
		client := helmClient(t, s)
		if err := helmLogin(client, s, impostor); err == nil {
			t.Error("logged in with a wrong password")
		}
		if err := helmLogin(client, s, writer); err != nil {
			t.Fatal(err)
		}
		for _, version := range []string{"1.0.0", "1.1.0"} {
			chart := newChart(t, version)
			if _, err := client.Push(chart, s.host+"/team/charts/app:"+version); err != nil {
				t.Fatal(err)
			}
			pulled, err := client.Pull(s.host + "/team/charts/app:" + version)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(pulled.Chart.Data, chart) || pulled.Chart.Meta.Version != version {
				t.Errorf("pulled another chart: %+v", pulled.Chart.Meta)
			}
		}
		tags, err := client.Tags(s.host + "/team/charts/app")
		if err != nil || !slices.Equal(tags, []string{"1.1.0", "1.0.0"}) {
			t.Errorf("versions are %q, %v", tags, err)
		}
	})
	t.Run("no more than the scope map allows", func(t *testing.T) {
		s := newSite(t, data, v1alpha1.ModeReadWrite)
		client := helmClient(t, s)
		if err := helmLogin(client, s, reader); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Pull(s.host + "/team/charts/app:1.0.0"); err != nil {
			t.Error(err)
		}
		_, err := client.Push(newChart(t, "2.0.0"), s.host+"/team/charts/app:2.0.0")
		wantRefusal(t, "push by a reader", err, "403", "denied")
		_, err = client.Pull(s.host + "/secret/charts/app:1.0.0")
		wantRefusal(t, "pull from outside the scope map", err, "403", "denied")
	})
	t.Run("read-only", func(t *testing.T) {
		s := newSite(t, data, v1alpha1.ModeReadOnly)
		client := helmClient(t, s)
		if err := helmLogin(client, s, writer); err != nil {
			t.Fatal(err)
		}
		_, err := client.Push(newChart(t, "2.0.0"), s.host+"/team/charts/app:2.0.0")
		wantRefusal(t, "push", err, "read-only")
	})
}

func helmClient(t *testing.T, s *site) *helm.Client {
	t.Helper()
	client, err := helm.NewClient(
		helm.ClientOptWriter(io.Discard),
		helm.ClientOptCredentialsFile(filepath.Join(t.TempDir(), "config.json")),
		helm.ClientOptHTTPClient(s.httpClient(t)),
	)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func helmLogin(client *helm.Client, s *site, l login) error {
	return client.Login(s.host,
		helm.LoginOptTLSClientConfigFromConfig(&tls.Config{RootCAs: s.pool}),
		helm.LoginOptBasicAuth(l.user, l.password))
}

// newChart is a chart with nothing in it.
func newChart(t *testing.T, version string) []byte {
	t.Helper()
	meta := "apiVersion: v2\nname: app\nversion: " + version + "\n"
	var out bytes.Buffer
	zipped := gzip.NewWriter(&out)
	archive := tar.NewWriter(zipped)
	if err := archive.WriteHeader(&tar.Header{Name: "app/Chart.yaml", Mode: 0o644, Size: int64(len(meta))}); err != nil {
		t.Fatal(err)
	}
	if _, err := archive.Write([]byte(meta)); err != nil {
		t.Fatal(err)
	}
	if err := archive.Close(); err != nil {
		t.Fatal(err)
	}
	if err := zipped.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
