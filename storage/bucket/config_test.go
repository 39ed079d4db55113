package bucket

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestLoad(t *testing.T) {
	load := func(text string) (Config, error) {
		file := filepath.Join(t.TempDir(), "storage.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return Load(file)
	}
	for text, want := range map[string]Config{
		"s3: {bucket: images}": {S3: &S3{Bucket: "images"}},
		"s3:\n  bucket: images\n  region: eu-central-1\n  endpoint: https://minio.shop.example:9000\n  prefix: edge\n  pathStyle: true\ncaFile: /etc/ca.crt\ncredentials: /etc/keys\n": {
			S3:     &S3{Bucket: "images", Region: "eu-central-1", Endpoint: "https://minio.shop.example:9000", Prefix: "edge", PathStyle: true},
			CAFile: "/etc/ca.crt", Credentials: "/etc/keys",
		},
		"azure: {account: images, container: edge, endpoint: 'https://images.blob.core.windows.net', prefix: a/b}": {
			Azure: &Azure{Account: "images", Container: "edge", Endpoint: "https://images.blob.core.windows.net", Prefix: "a/b"},
		},
		"gcs: {bucket: images, endpoint: '', prefix: edge/}": {GCS: &GCS{Bucket: "images", Prefix: "edge/"}},
	} {
		got, err := load(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: -want +got:\n%s", text, diff)
		}
	}
	for text, want := range map[string][]string{
		"":                                  {"storage.yaml: ", "0 of s3, azure and gcs", "exactly one"},
		"s3: {bucket: a}\ngcs: {bucket: b}": {"2 of s3, azure and gcs", "exactly one"},
		"s3: {}":                            {"s3.bucket: is empty", "name the bucket"},
		"s3: {bucket: a/b}":                 {`s3.bucket: "a/b" is not the name`},
		"s3: {bucket: a, buckets: b}":       {"buckets"},
		"s3: {bucket: a, endpoint: host:1}": {"s3.endpoint: is not a URL", "https://"},
		"s3: {bucket: a, endpoint: 'https://u:Secret@h'}":       {"s3.endpoint: ", "credentials go into files"},
		"s3: {bucket: a, endpoint: 'https://h/path'}":           {"s3.endpoint: has a path", "leave it out"},
		"s3: {bucket: a, region: 'eu central'}":                 {"s3.region: ", "eu-central-1"},
		"s3: {bucket: a, prefix: /a}":                           {"s3.prefix: ", "edge/images"},
		"s3: {bucket: a, prefix: a//b}":                         {"s3.prefix: "},
		"azure: {account: Images, container: a}":                {"azure.account: ", "lower-case"},
		"azure: {container: a}":                                 {"azure.account: is empty"},
		"azure: {account: images}":                              {"azure.container: is empty"},
		"azure: {account: images, container: a, prefix: 'a b'}": {"azure.prefix: "},
		"gcs: {bucket: ''}":                                     {"gcs.bucket: is empty"},
		"gcs: {bucket: a}\n---\ngcs: {bucket: b}":               {"more than one document"},
		"gcs: [":                                {"storage.yaml: is not YAML: line 2: "},
		"s3: {bucket: a}\nswift: {key: Secret}": {"storage.yaml: line 2: field swift is unknown: there are s3, azure or gcs"},
		"s3: {bucket: [Secret]}":                {"storage.yaml: line 1: the value has another form"},
		"Secret":                                {"storage.yaml: line 1: the value has another form"},
	} {
		_, err := load(text)
		if err == nil {
			t.Errorf("%q: no error", text)
			continue
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) || strings.Contains(err.Error(), "Secret") {
				t.Errorf("%q: %v, want %q", text, err, w)
			}
		}
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a file that is not there is no error")
	}
}

// FuzzParse holds whatever is read to being usable: what passes can be opened.
func FuzzParse(f *testing.F) {
	for _, text := range []string{
		"s3: {bucket: images, region: eu-central-1, endpoint: 'https://h:9000', prefix: edge, pathStyle: true}\ncaFile: a\ncredentials: b",
		"azure: {account: images, container: edge}", "gcs: {bucket: b}", "s3: *a", "a: &a [*a]", "---\n---\n",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parse(data)
		if err != nil {
			return
		}
		if err := c.validate(); err != nil {
			t.Errorf("read, and not valid: %v", err)
		}
		c.CAFile, c.Credentials = "", "" // which are not there
		t.Setenv("AWS_REGION", "eu-central-1")
		b, err := Open(t.Context(), c)
		if err != nil && !strings.Contains(err.Error(), "azure.account") {
			t.Errorf("read, and cannot be opened: %v", err)
		} else if err == nil && strings.HasSuffix(b.String(), "/") {
			t.Errorf("its name is %s", b)
		}
	})
}

func FuzzParseUpload(f *testing.F) {
	f.Add(newUpload("docker/registry/v2/blobs/data"))
	f.Add("abc-def-")
	f.Fuzz(func(t *testing.T, name string) {
		key, _, ok := parseUpload(name)
		if ok && key == "" {
			t.Errorf("%q goes to no key", name)
		}
		s := scratch{"edge/"}
		if place := s.place(name); strings.Count(place, "/") != 2 {
			t.Errorf("%q is kept at %q", name, place)
		}
		want, err := s.begin(t.Context(), s.prefix+name, nil)
		if err != nil {
			t.Error(err)
		}
		for _, prefix := range []string{"", s.prefix, s.prefix + name} {
			if got, ok := s.find(s.place(want)+"/00001", prefix); name != "" && (!ok || got.Key != s.prefix+name || got.Upload != want) {
				t.Errorf("an upload to %q is found as %+v", name, got)
			}
		}
		if got, ok := s.find(s.place(want)+"/00001", "other/"); ok {
			t.Errorf("an upload to %q is found elsewhere, as %+v", name, got)
		}
	})
}

func TestCredentials(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s3 := Config{S3: &S3{Bucket: "b", Region: "r"}, Credentials: dir}
	azure := Config{Azure: &Azure{Container: "b"}, Credentials: dir}
	gcs := Config{GCS: &GCS{Bucket: "b"}, Credentials: dir}
	wants := func(c Config, want string) {
		t.Helper()
		b, err := Open(t.Context(), c)
		switch {
		case want == "" && err != nil:
			t.Error(err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "Secret")):
			t.Errorf("%v, %v: want %q", b, err, want)
		}
	}
	wants(s3, "accessKeyID or secretAccessKey is missing")
	wants(azure, "put exactly one")
	wants(gcs, "credentials.json is missing")
	write("accessKeyID", "id\n")
	wants(s3, "accessKeyID or secretAccessKey is missing")
	write("secretAccessKey", "Secret\n")
	wants(s3, "")
	write("accountKey", "Secret, not base64")
	wants(azure, "azure.account")
	azure.Azure.Account = "images"
	wants(azure, "not in base64")
	write("accountKey", "U2VjcmV0")
	wants(azure, "")
	write("sasToken", "?sig=Secret")
	wants(azure, "put exactly one")
	write("accountKey", "")
	wants(azure, "")
	write("sasToken", "")
	write("connectionString", "DefaultEndpointsProtocol=https;AccountName=images;AccountKey=U2VjcmV0;EndpointSuffix=core.chinacloudapi.cn")
	azure.Azure.Account = ""
	wants(azure, "")
	write("connectionString", "AccountName=images;Secret")
	wants(azure, "neither an AccountKey nor a SharedAccessSignature")
	write("credentials.json", `{"type": "service_account", "private_key": "Secret"}`)
	wants(gcs, "")
	write("credentials.json", `{"type": "gdch_service_account"}`)
	wants(gcs, "credentials.json")
	s3.CAFile = filepath.Join(dir, "accessKeyID")
	wants(s3, "holds no certificate")
	s3.CAFile = filepath.Join(dir, "none")
	wants(s3, "none: no such file or directory: set it to a file with the certificates")
	write("both", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----\nSecret\n-----END PRIVATE KEY-----\n")
	s3.CAFile = filepath.Join(dir, "both")
	wants(s3, "both holds a private key: leave certificates alone there")
}
