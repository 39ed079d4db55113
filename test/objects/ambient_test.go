package objects

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// TestAmbient takes the identity that the environment provides: the object stores
// are real, who hands out the credentials speaks as Amazon's and Google's do.
func TestAmbient(t *testing.T) {
	minio := startMinIO(t, MinIO{Buckets: []string{"images"}})
	for _, name := range []string{
		"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN", "AWS_REGION",
		"AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "AWS_ENDPOINT_URL_STS",
	} {
		t.Setenv(name, "")
	}
	until := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	token := filepath.Join(directory(t, map[string]string{"token": "this-pod"}), "token")
	works := func(t *testing.T, c bucket.Config) {
		t.Helper()
		if err := bucket.Check(t.Context(), open(t, c)); err != nil {
			t.Error(err)
		}
	}
	c := bucket.Config{S3: &bucket.S3{Bucket: "images", Endpoint: minio.URL, PathStyle: true}}
	t.Run("Environment", func(t *testing.T) {
		t.Setenv("AWS_ACCESS_KEY_ID", AccessKeyID)
		t.Setenv("AWS_SECRET_ACCESS_KEY", SecretAccessKey)
		works(t, c)
	})
	t.Run("PodIdentity", func(t *testing.T) {
		asked := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "this-pod\n" && r.Header.Get("Authorization") != "this-pod" {
				w.WriteHeader(http.StatusForbidden)
				return
			}
			fmt.Fprintf(w, `{"AccessKeyId": %q, "SecretAccessKey": %q, "Token": "", "Expiration": %q}`, AccessKeyID, SecretAccessKey, until)
		})
		t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", asked.URL)
		t.Setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", token)
		works(t, c)
	})
	t.Run("WebIdentity", func(t *testing.T) {
		asked := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if r.FormValue("Action") != "AssumeRoleWithWebIdentity" || !strings.HasPrefix(r.FormValue("WebIdentityToken"), "this-pod") || r.FormValue("RoleArn") != "arn:aws:iam::123456789012:role/images" {
				w.WriteHeader(http.StatusForbidden)
				return
			}
			w.Header().Set("Content-Type", "text/xml")
			fmt.Fprintf(w, `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>%s</AccessKeyId><SecretAccessKey>%s</SecretAccessKey><SessionToken></SessionToken><Expiration>%s</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`, AccessKeyID, SecretAccessKey, until)
		})
		t.Setenv("AWS_WEB_IDENTITY_TOKEN_FILE", token)
		t.Setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/images")
		t.Setenv("AWS_ENDPOINT_URL_STS", asked.URL)
		works(t, c)
	})
	t.Run("Instance", func(t *testing.T) {
		asked := serve(t, func(w http.ResponseWriter, r *http.Request) {
			const roles = "/latest/meta-data/iam/security-credentials/"
			switch r.URL.Path {
			case "/latest/api/token":
				w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "21600")
				io.WriteString(w, "session") //nolint:errcheck // seen by who asks
			case roles:
				io.WriteString(w, "images") //nolint:errcheck // seen by who asks
			case roles + "images":
				fmt.Fprintf(w, `{"Code": "Success", "AccessKeyId": %q, "SecretAccessKey": %q, "Token": "", "Expiration": %q}`, AccessKeyID, SecretAccessKey, until)
			default:
				w.WriteHeader(http.StatusNotFound)
			}
		})
		t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", asked.URL)
		works(t, c)
	})
	t.Run("None", func(t *testing.T) {
		asked := serve(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) })
		t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", asked.URL)
		err := bucket.Check(t.Context(), open(t, c))
		if err == nil || !strings.Contains(err.Error(), "s3://images: ") || !strings.Contains(err.Error(), "no credentials") || !strings.Contains(err.Error(), "instance profile") {
			t.Error(err)
		}
	})
	t.Run("Google", func(t *testing.T) {
		google := startFakeGCS(t)
		url, count := tokens(t)
		t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", filepath.Join(directory(t, map[string]string{"key.json": serviceAccount(t, url)}), "key.json"))
		works(t, bucket.Config{GCS: &bucket.GCS{Bucket: "images", Endpoint: google.URL}})
		if count.Load() == 0 {
			t.Error("nobody asked for a token")
		}
	})
}

func serve(t *testing.T, handle http.HandlerFunc) *httptest.Server {
	s := httptest.NewServer(handle)
	t.Cleanup(s.Close)
	return s
}
