package objects

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"log"
	"math/big"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// issue makes a certificate, signed by itself, for a host until a time.
func issue(t *testing.T, host string, until time.Time) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "objects"}, NotBefore: until.Add(-48 * time.Hour), NotAfter: until,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

// tlsServer listens with a certificate, which is also in the file.
func tlsServer(t *testing.T, host string, until time.Time) (url, caFile string) {
	t.Helper()
	certificate, key := issue(t, host, until)
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(nil)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL, filepath.Join(directory(t, map[string]string{"ca.crt": string(certificate)}), "ca.crt")
}

// TestErrors holds errors to naming the bucket and the remedy, and to no secret.
func TestErrors(t *testing.T) {
	t.Parallel()
	minio, azurite, google := startMinIO(t, MinIO{Buckets: []string{"images"}}), startAzurite(t), startFakeGCS(t)
	tokenURL, _ := tokens(t)
	valid, validCA := tlsServer(t, "127.0.0.1", time.Now().Add(time.Hour))
	expired, expiredCA := tlsServer(t, "127.0.0.1", time.Now().Add(-time.Hour))
	misnamed, misnamedCA := tlsServer(t, "objects.example", time.Now().Add(time.Hour))
	free, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	const secret = "Sup3rS3cr3tThatNobodyMaySee"
	signature := "sv=2021-12-02&ss=b&srt=sco&sp=rwdlac&se=2099-01-01T00:00:00Z&sig=" + secret + "%3D"

	s3 := func(change func(*bucket.Config)) bucket.Config {
		c := minioConfig(t, minio)
		change(&c)
		return c
	}
	azure := func(change func(*bucket.Config)) bucket.Config {
		c := azureConfig(t, azurite)
		change(&c)
		return c
	}
	gcs := func(tokens string, change func(*bucket.Config)) bucket.Config {
		c := gcsConfig(t, google, tokens)
		change(&c)
		return c
	}
	for name, test := range map[string]struct {
		config bucket.Config
		want   []string
	}{
		"S3 missing bucket": {s3(func(c *bucket.Config) { c.S3.Bucket = "none" }), []string{"s3://none: ", "no such bucket", "NoSuchBucket", "s3.bucket"}},
		"S3 unknown key": {s3(func(c *bucket.Config) {
			c.Credentials = directory(t, map[string]string{"accessKeyID": "nobody", "secretAccessKey": secret})
		}), []string{"s3://images: ", "not accepted (InvalidAccessKeyId)", "accessKeyID and secretAccessKey"}},
		"S3 wrong secret": {s3(func(c *bucket.Config) {
			c.Credentials = directory(t, map[string]string{"accessKeyID": AccessKeyID, "secretAccessKey": secret})
		}), []string{"not accepted (SignatureDoesNotMatch)"}},
		"S3 unknown authority":        {s3(func(c *bucket.Config) { c.S3.Endpoint = valid }), []string{valid, "authority unknown here", "caFile"}},
		"S3 expired certificate":      {s3(func(c *bucket.Config) { c.S3.Endpoint, c.CAFile = expired, expiredCA }), []string{expired, "has expired", "renew"}},
		"S3 other host's certificate": {s3(func(c *bucket.Config) { c.S3.Endpoint, c.CAFile = misnamed, misnamedCA }), []string{"127.0.0.1", "correct the endpoint"}},
		"S3 known authority":          {s3(func(c *bucket.Config) { c.S3.Endpoint, c.CAFile = valid, validCA }), []string{"file does not exist"}},
		"S3 TLS to plain HTTP":        {s3(func(c *bucket.Config) { c.S3.Endpoint = strings.Replace(minio.URL, "http:", "https:", 1) }), []string{"plain HTTP", "http:// or https://"}},
		"S3 unknown host":             {s3(func(c *bucket.Config) { c.S3.Endpoint = "http://objects.invalid:9000" }), []string{"objects.invalid", "cannot be found", "DNS"}},
		"S3 nobody there":             {s3(func(c *bucket.Config) { c.S3.Endpoint = "http://" + free }), []string{free, "nobody listens"}},

		"Azure missing container": {azure(func(c *bucket.Config) { c.Azure.Container = "none" }), []string{"azure://none: ", "no such bucket", "ContainerNotFound", "azure.container"}},
		"Azure wrong key": {azure(func(c *bucket.Config) {
			c.Credentials = directory(t, map[string]string{"accountKey": base64.StdEncoding.EncodeToString([]byte(secret))})
		}), []string{"azure://images: ", "accountKey"}},
		"Azure nobody there": {azure(func(c *bucket.Config) {
			c.Azure.Endpoint, c.Credentials = "http://"+free+"/"+AzureAccount, directory(t, map[string]string{"sasToken": signature})
		}), []string{free, "nobody listens"}},
		"Azure wrong signature": {azure(func(c *bucket.Config) { c.Credentials = directory(t, map[string]string{"sasToken": signature}) }), []string{"azure://images: ", "sasToken"}},
		"Azure unknown authority": {azure(func(c *bucket.Config) {
			c.Azure.Endpoint, c.Credentials = valid, directory(t, map[string]string{"sasToken": signature})
		}), []string{"authority unknown here", "caFile"}},

		"GCS nobody there":        {gcs(tokenURL, func(c *bucket.Config) { c.GCS.Endpoint = "http://" + free }), []string{"gs://images: ", free, "nobody listens"}},
		"GCS nobody gives tokens": {gcs("http://"+free, func(*bucket.Config) {}), []string{"gs://images: ", "no credentials", "credentials.json"}},
		"GCS unknown authority":   {gcs(tokenURL, func(c *bucket.Config) { c.GCS.Endpoint = valid }), []string{"authority unknown here", "caFile"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := open(t, test.config)
			_, err := b.Stat(t.Context(), "object")
			if err == nil {
				t.Fatal("no error")
			}
			if gone := errors.Is(err, fs.ErrNotExist); gone != (name == "S3 known authority") {
				t.Errorf("the error is of a missing object: %v", err)
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
			for _, other := range []error{err, bucket.Check(t.Context(), b), listError(t, b), openError(t, b)} {
				if other == nil || strings.Contains(other.Error(), secret) || strings.Contains(other.Error(), SecretAccessKey) || strings.Contains(other.Error(), "sig=") {
					t.Errorf("the error is nil, or tells a secret: %v", other)
				}
			}
		})
	}
}

func listError(t *testing.T, b bucket.Bucket) error {
	for _, err := range b.List(t.Context(), "", "", "") {
		return err
	}
	return errors.New("nothing listed, and no error")
}

func openError(t *testing.T, b bucket.Bucket) error {
	body, _, err := b.Open(t.Context(), "object", 0, -1)
	if err == nil {
		body.Close()
	}
	return err
}

// TestKilled kills a server in the midst, and starts it again.
func TestKilled(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(*testing.T) (*Server, bucket.Bucket){
		"S3": func(t *testing.T) (*Server, bucket.Bucket) {
			s := startMinIO(t, MinIO{Buckets: []string{"images"}})
			return s, open(t, minioConfig(t, s))
		},
		"Azure": func(t *testing.T) (*Server, bucket.Bucket) {
			s := startAzurite(t)
			return s, open(t, azureConfig(t, s))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, b := start(t)
			end := s.Kill
			if name == "Azure" {
				end = s.Stop // an Azurite that is killed forgets what it took last; Azure does not
			}
			crash := func() {
				end()
				if err := s.Restart(t.Context()); err != nil {
					t.Error(err)
				}
			}
			content := bytes.Repeat([]byte("0123456789abcdef"), 2<<20)
			id, err := b.Begin(t.Context(), "object", nil)
			if err != nil {
				t.Fatal(err)
			}
			r := &trap{ReadSeeker: bytes.NewReader(content), after: int64(len(content)) * 3 / 2, spring: crash}
			part, err := b.Part(t.Context(), "object", id, 1, r, int64(len(content)))
			if err != nil || r.spring != nil {
				t.Fatalf("killed while it took a part: %v; killed: %v", err, r.spring == nil)
			}
			if err := b.Complete(t.Context(), "object", id, []bucket.Part{part}, nil); err != nil {
				t.Fatal(err)
			}
			body, _, err := b.Open(t.Context(), "object", 0, -1)
			if err != nil {
				t.Fatal(err)
			}
			defer body.Close()
			head := make([]byte, 1000)
			if _, err := io.ReadFull(body, head); err != nil {
				t.Fatal(err)
			}
			crash()
			rest, err := io.ReadAll(body)
			if err != nil || !bytes.Equal(append(head, rest...), content) {
				t.Errorf("killed while it was read: %d of %d bytes, %v", len(head)+len(rest), len(content), err)
			}

			body2, _, err := b.Open(t.Context(), "object", 0, -1)
			if err != nil {
				t.Fatal(err)
			}
			defer body2.Close()
			end()
			if n, err := io.Copy(io.Discard, body2); err == nil || n == int64(len(content)) {
				t.Errorf("killed for good, %d of %d bytes were read: %v", n, len(content), err)
			}
			if _, err := b.Put(t.Context(), "other", content[:10], nil, bucket.Conditions{}); err == nil {
				t.Error("a dead server takes objects")
			}
			if err := s.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := b.Stat(t.Context(), "object"); err != nil {
				t.Error(err)
			}
		})
	}
}

// trap springs once so many bytes were read.
type trap struct {
	io.ReadSeeker
	after  int64
	spring func()
}

func (r *trap) Read(p []byte) (int, error) {
	n, err := r.ReadSeeker.Read(p)
	if r.after -= int64(n); r.after <= 0 && r.spring != nil {
		spring := r.spring
		r.spring = nil
		spring()
	}
	return n, err
}

// TestRotation changes credentials while a bucket is in use.
func TestRotation(t *testing.T) {
	t.Parallel()
	c := minioConfig(t, startMinIO(t, MinIO{Buckets: []string{"images"}}))
	b := open(t, c)
	if _, err := b.Put(t.Context(), "object", nil, nil, bucket.Conditions{}); err != nil {
		t.Fatal(err)
	}
	write := func(secret string) {
		if err := os.WriteFile(filepath.Join(c.Credentials, "secretAccessKey"), []byte(secret), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	until := func(want bool) {
		t.Helper()
		for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
			_, err := b.Stat(t.Context(), "object")
			if (err == nil) == want {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("still, after %v: %v", patience, err)
			}
		}
	}
	write("wrong")
	until(false)
	write(SecretAccessKey)
	until(true)
	if err := os.Remove(filepath.Join(c.Credentials, "secretAccessKey")); err != nil {
		t.Fatal(err)
	}
	time.Sleep(6 * time.Second) // longer than a credential is taken as good unseen
	if _, err := b.Stat(t.Context(), "object"); err != nil {
		t.Errorf("what was good last is not kept: %v", err)
	}
}
