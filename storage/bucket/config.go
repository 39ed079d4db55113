package bucket

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"

	"go.yaml.in/yaml/v4"
)

// Config says which bucket, where, and with what credentials. Exactly one of S3,
// Azure and GCS is set.
type Config struct {
	S3    *S3    `yaml:"s3"`
	Azure *Azure `yaml:"azure"`
	GCS   *GCS   `yaml:"gcs"`
	// CAFile holds certificates in PEM that the object store's may be signed
	// by, besides those the system knows. Empty: those alone.
	CAFile string `yaml:"caFile"`
	// Credentials is a directory with a file for each credential, read again
	// when it changes. Empty: the identity that the environment provides.
	//
	//	S3:    accessKeyID, secretAccessKey and, when temporary, sessionToken
	//	Azure: accountKey, sasToken or connectionString
	//	GCS:   credentials.json, of a service account or of a workload identity
	Credentials string `yaml:"credentials"`
}

// S3 is a bucket of Amazon S3, or of what speaks its protocol.
type S3 struct {
	Bucket string `yaml:"bucket"`
	// Region is where the bucket is. Empty: AWS_REGION, what the machine's
	// metadata say, or us-east-1 at an endpoint of one's own.
	Region string `yaml:"region"`
	// Endpoint is a URL without a path. Empty: Amazon's for the region.
	Endpoint string `yaml:"endpoint"`
	// Prefix is what all keys lie below. Empty: the whole bucket.
	Prefix string `yaml:"prefix"`
	// PathStyle puts the bucket into the path of URLs, not before the host.
	PathStyle bool `yaml:"pathStyle"`
	// CopyLimit is how many bytes the store copies in one step, 5 MiB at least.
	// Zero: 5 GiB, as Amazon does.
	CopyLimit int64 `yaml:"-"`
}

// Azure is a container of Azure Blob Storage.
type Azure struct {
	// Account is the storage account's name. Empty: the connectionString's.
	Account   string `yaml:"account"`
	Container string `yaml:"container"`
	// Endpoint is the account's URL. Empty: the public cloud's.
	Endpoint string `yaml:"endpoint"`
	// Prefix is what all blobs lie below. Empty: the whole container.
	Prefix string `yaml:"prefix"`
}

// GCS is a bucket of Google Cloud Storage.
type GCS struct {
	Bucket string `yaml:"bucket"`
	// Endpoint is a URL without a path. Empty: Google's.
	Endpoint string `yaml:"endpoint"`
	// Prefix is what all objects lie below. Empty: the whole bucket.
	Prefix string `yaml:"prefix"`
}

// maxConfig is far more than any configuration has, in bytes.
const maxConfig = 1 << 20

// Load reads the configuration in a file in YAML. The error names the file and,
// for each thing that is wrong, the field and the remedy.
func Load(file string) (Config, error) {
	f, err := os.Open(file)
	if err != nil {
		return Config{}, fmt.Errorf("storage: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfig))
	if err != nil {
		return Config{}, fmt.Errorf("storage: %w: give the file that names the object store", err)
	}
	c, err := parse(data)
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

func parse(data []byte) (Config, error) {
	var c Config
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	if err := d.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return Config{}, malformed(err)
	}
	if err := d.Decode(new(any)); !errors.Is(err, io.EOF) {
		return Config{}, errors.New("there is more than one document: keep one")
	}
	return c, c.validate()
}

// malformed says what is wrong with a document, with none of its values, which
// may be credentials in the wrong place.
func malformed(err error) error {
	var fields *yaml.LoadErrors
	if !errors.As(err, &fields) {
		return fmt.Errorf("is not YAML: %s", strings.TrimPrefix(err.Error(), "yaml: "))
	}
	var problems []error
	for _, f := range fields.Errors {
		what, _, unknown := strings.Cut(f.Message, " not found in type ")
		switch {
		case unknown:
			what += " is unknown: there are s3, azure or gcs, with what belongs to it, caFile and credentials"
		case strings.HasPrefix(f.Message, "cannot construct"):
			what = "the value has another form than is wanted: write it as in s3: {bucket: images}"
		}
		problems = append(problems, fmt.Errorf("line %d: %s", f.Mark.Line, what))
	}
	return errors.Join(problems...)
}

func (c Config) validate() error {
	var problems []error
	wrong := func(field, format string, args ...any) {
		problems = append(problems, fmt.Errorf(field+": "+format, args...))
	}
	kinds := 0
	if s := c.S3; s != nil {
		kinds++
		required(wrong, "s3.bucket", s.Bucket)
		address(wrong, "s3.endpoint", s.Endpoint, false)
		below(wrong, "s3.prefix", s.Prefix)
		if !made(s.Region, "-", 64) {
			wrong("s3.region", "%q is not the name of a region: write it as in eu-central-1", s.Region)
		}
		if s.CopyLimit != 0 && s.CopyLimit < 5<<20 {
			wrong("CopyLimit", "%d bytes are less than 5 MiB", s.CopyLimit)
		}
	}
	if a := c.Azure; a != nil {
		kinds++
		required(wrong, "azure.container", a.Container)
		address(wrong, "azure.endpoint", a.Endpoint, true)
		below(wrong, "azure.prefix", a.Prefix)
		if a.Account == "" && a.Endpoint == "" && c.Credentials == "" {
			wrong("azure.account", "is empty: set it to the name of the storage account")
		}
		if a.Account != strings.ToLower(a.Account) || !made(a.Account, "", 24) {
			wrong("azure.account", "%q is not the name of a storage account: it has up to 24 lower-case letters and digits", a.Account)
		}
	}
	if g := c.GCS; g != nil {
		kinds++
		required(wrong, "gcs.bucket", g.Bucket)
		address(wrong, "gcs.endpoint", g.Endpoint, false)
		below(wrong, "gcs.prefix", g.Prefix)
	}
	if kinds != 1 {
		problems = append(problems, fmt.Errorf("%d of s3, azure and gcs are set: set exactly one", kinds))
	}
	return errors.Join(problems...)
}

// made says whether a value has so many bytes at most, all of them letters,
// digits, or of others. It stands in for regular expressions, which would be
// kept in memory by every process, on every node.
func made(value, others string, longest int) bool {
	for _, c := range value {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && !strings.ContainsRune(others, c) {
			return false
		}
	}
	return len(value) <= longest
}

func required(wrong func(field, format string, args ...any), field, value string) {
	switch {
	case value == "":
		wrong(field, "is empty: name the bucket or container, which must exist")
	case !made(value, "._-$", 222) || strings.ContainsAny(value[:1], "._-"):
		wrong(field, "%q is not the name of a bucket or container: correct it", value)
	}
}

// address checks a URL, with credentials never in it.
func address(wrong func(field, format string, args ...any), field, value string, path bool) {
	if value == "" {
		return
	}
	u, err := url.Parse(value)
	switch {
	case err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.Opaque != "":
		wrong(field, "is not a URL: write it as in https://objects.example:9000")
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		wrong(field, "has more than scheme, host and path: credentials go into files in the directory that credentials names")
	case !path && strings.Trim(u.Path, "/") != "":
		wrong(field, "has a path, %q: leave it out, the bucket and the prefix have fields of their own", u.Path)
	}
}

func below(wrong func(field, format string, args ...any), field, value string) {
	if len(value) > 500 {
		wrong(field, "is longer than 500 bytes: shorten it")
	} else if !made(value, "_.-/", 500) || strings.HasPrefix(value, "/") || strings.Contains(value, "//") {
		wrong(field, "%q is not a prefix: use letters, digits, -, _ and ., with a slash between, as in edge/images", value)
	}
}

// Open makes a Bucket of a configuration. It asks the object store for nothing:
// Check does.
func Open(ctx context.Context, c Config) (Bucket, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	t, err := newTransport(c.CAFile)
	if err != nil {
		return nil, err
	}
	switch {
	case c.S3 != nil:
		return newS3(ctx, c, t)
	case c.Azure != nil:
		return newAzure(c, t)
	default:
		return newGCS(c, t)
	}
}

// folder is a prefix as keys begin with it.
func folder(prefix string) string {
	if prefix == "" || strings.HasSuffix(prefix, "/") {
		return prefix
	}
	return prefix + "/"
}
