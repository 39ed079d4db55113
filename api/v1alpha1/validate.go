package v1alpha1

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Bounds of the fields that have them.
const (
	MaxConcurrency   = 64
	MaxChunkSizeInMb = 1024
	MinWindow        = time.Minute
	MaxWindow        = 7 * 24 * time.Hour
)

// Validate reports everything that is wrong with a resource whose defaults are
// set. Each error's Detail is a whole sentence part, to be read after the
// field's name, and never quotes what could be a secret.
func (c *ConnectedRegistry) Validate() field.ErrorList {
	var errs field.ErrorList
	if c.Name == "" {
		errs = append(errs, required(field.NewPath("metadata", "name"), "give this connected registry a name"))
	} else if len(validation.IsDNS1123Subdomain(c.Name)) > 0 {
		errs = append(errs, invalid(field.NewPath("metadata", "name"), c.Name, "is not a name for a resource: use lower-case letters, digits, '-' and '.'"))
	}
	return append(errs, c.Spec.validate(field.NewPath("spec"))...)
}

func (s *Spec) validate(p *field.Path) field.ErrorList {
	var errs field.ErrorList
	errs = append(errs, oneOf(p.Child("mode"), s.Mode, ModeReadOnly, ModeReadWrite)...)
	errs = append(errs, oneOf(p.Child("logLevel"), s.LogLevel,
		LogLevelDebug, LogLevelInformation, LogLevelWarning, LogLevelError, LogLevelNone)...)
	if s.LoginServer != "" {
		errs = append(errs, validHost(p.Child("loginServer"), s.LoginServer)...)
	}
	if s.Parent != nil {
		errs = append(errs, s.Parent.validate(p.Child("parent"))...)
	} else if len(s.Repositories) > 0 {
		errs = append(errs, required(p.Child("parent"), "name the registry that the repositories come from"))
	}
	for i := range s.Repositories {
		errs = append(errs, s.Repositories[i].validate(p.Child("repositories").Index(i), s.Parent)...)
	}
	for i := range s.Upstreams {
		errs = append(errs, s.Upstreams[i].validate(p.Child("upstreams").Index(i))...)
	}
	errs = append(errs, s.Sync.validate(p.Child("sync"))...)
	if s.Sync.DeletePropagation && s.Mode == ModeReadWrite {
		errs = append(errs, forbidden(p.Child("sync", "deletePropagation"), "cannot stand beside mode ReadWrite, where it would remove what clients push: leave one of them out"))
	}
	errs = append(errs, validTokens(p.Child("clientTokens"), s.ClientTokens)...)
	errs = append(errs, validMirrors(p.Child("mirrors"), s.Mirrors)...)
	errs = append(errs, s.NodeCache.validate(p.Child("nodeCache"))...)
	errs = append(errs, s.TLS.validate(p.Child("tls"))...)
	if s.TLS.Disabled && !s.TrustDistribution.Disabled {
		errs = append(errs, forbidden(p.Child("tls", "disabled"), "leaves nothing to trust: set trustDistribution.disabled as well"))
	}
	errs = append(errs, s.TrustDistribution.validate(p.Child("trustDistribution"))...)
	for i := range s.ImmutableTags {
		errs = append(errs, s.ImmutableTags[i].validate(p.Child("immutableTags").Index(i))...)
	}
	errs = append(errs, validQuantity(p.Child("quota", "total"), s.Quota.Total)...)
	errs = append(errs, validQuantity(p.Child("quota", "perRepository"), s.Quota.PerRepository)...)
	errs = append(errs, s.GarbageCollection.validate(p.Child("garbageCollection"))...)
	for i := range s.Notifications {
		errs = append(errs, s.Notifications[i].validate(p.Child("notifications").Index(i))...)
	}
	return errs
}

func (u *Upstream) validate(p *field.Path) field.ErrorList {
	errs := u.Parent.validate(p)
	errs = append(errs, validPrefix(p.Child("prefix"), u.Prefix)...)
	if len(u.Repositories) == 0 {
		errs = append(errs, required(p.Child("repositories"), "name what to keep of this registry"))
	}
	for i := range u.Repositories {
		errs = append(errs, u.Repositories[i].validate(p.Child("repositories").Index(i), &u.Parent)...)
	}
	return errs
}

func validPrefix(p *field.Path, prefix string) field.ErrorList {
	if prefix != "" && !ValidRepositoryName(prefix) {
		return field.ErrorList{invalid(p, prefix, `is not the beginning of a repository name: use for example "mirror/docker.io"`)}
	}
	return nil
}

func (c *NodeCache) validate(p *field.Path) field.ErrorList {
	errs := validQuantity(p.Child("maxSize"), c.MaxSize)
	errs = append(errs, validQuantity(p.Child("minFreeDisk"), c.MinFreeDisk)...)
	if c.OfflineAccess != "" {
		errs = append(errs, validDuration(p.Child("offlineAccess"), c.OfflineAccess, time.Minute, 366*24*time.Hour, "PT1M and P366D")...)
	}
	return append(errs, validQuantity(p.Child("prefetchBandwidth"), c.PrefetchBandwidth)...)
}

func (t *TLS) validate(p *field.Path) field.ErrorList {
	errs := oneOf(p.Child("source"), t.Source, TLSSourceBuiltIn, TLSSourceCertManager, TLSSourceSecret)
	switch name := p.Child("secretName"); {
	case t.Source == TLSSourceSecret:
		errs = append(errs, (&SecretRef{Name: t.SecretName}).validateAt(name)...)
	case t.SecretName != "":
		errs = append(errs, forbidden(name, "belongs to source Secret alone: leave it out or change the source"))
	}
	return errs
}

func (t *TrustDistribution) validate(p *field.Path) field.ErrorList {
	errs := validCASecrets(p.Child("caSecrets"), t.CASecrets)
	errs = append(errs, validDuration(p.Child("nodeTimeout"), t.NodeTimeout, time.Second, MaxWindow, "PT1S and P7D")...)
	return append(errs, validDuration(p.Child("hold"), t.Hold, time.Second, MaxWindow, "PT1S and P7D")...)
}

func validCASecrets(p *field.Path, secrets []CASecret) field.ErrorList {
	var errs field.ErrorList
	seen := make(map[string]bool)
	for i, s := range secrets {
		p := p.Index(i)
		errs = append(errs, (&SecretRef{Name: s.Name}).validate(p)...)
		if seen[s.Name] {
			errs = append(errs, field.Duplicate(p.Child("name"), s.Name))
			errs[len(errs)-1].Detail = fmt.Sprintf("%q is in the list already: give it all its hosts there", s.Name)
		}
		seen[s.Name] = true
		for j, host := range s.Hosts {
			errs = append(errs, validHost(p.Child("hosts").Index(j), host)...)
		}
	}
	return errs
}

func (t *ImmutableTags) validate(p *field.Path) field.ErrorList {
	var errs field.ErrorList
	if len(t.Repositories) == 0 {
		errs = append(errs, required(p.Child("repositories"), `name repositories, or "**" for all`))
	}
	for i, name := range t.Repositories {
		errs = append(errs, validRepositoryGlob(p.Child("repositories").Index(i), name)...)
	}
	for i, tag := range t.Tags {
		errs = append(errs, validTagPattern(p.Child("tags").Index(i), tag)...)
	}
	return errs
}

func (g *GarbageCollection) validate(p *field.Path) field.ErrorList {
	var errs field.ErrorList
	if _, err := ParseSchedule(g.Schedule); err != nil {
		errs = append(errs, field.Invalid(p.Child("schedule"), g.Schedule, err.Error()))
	}
	return append(errs, validDuration(p.Child("minAge"), g.MinAge, time.Hour, 365*24*time.Hour, "PT1H and P365D")...)
}

func (n *Notification) validate(p *field.Path) field.ErrorList {
	var errs field.ErrorList
	if len(n.Events) == 0 {
		errs = append(errs, required(p.Child("events"), `say what of, for example "team/*:push"`))
	}
	for i, pattern := range n.Events {
		if _, err := ParseEventPattern(pattern); err != nil {
			errs = append(errs, invalid(p.Child("events").Index(i), pattern, err.Error()))
		}
	}
	// Quoted nowhere: such URLs carry keys.
	u, err := url.Parse(n.URL)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		errs = append(errs, field.Invalid(p.Child("url"), field.OmitValueType{}, `is not a URL to send to: use for example "https://hooks.example.com/push"`))
	}
	if n.SecretRef != nil {
		errs = append(errs, n.SecretRef.validate(p.Child("secretRef"))...)
	}
	return errs
}

func validDuration(p *field.Path, s string, least, most time.Duration, between string) field.ErrorList {
	d, err := ParseDuration(s)
	if err != nil {
		return field.ErrorList{field.Invalid(p, s, err.Error())}
	}
	if d < least || d > most {
		return field.ErrorList{invalid(p, s, "is not between "+between)}
	}
	return nil
}

func (r *Parent) validate(p *field.Path) field.ErrorList {
	var errs field.ErrorList
	endpoint := p.Child("endpoint")
	switch {
	case r.ConnectionStringSecretRef == nil && r.Endpoint == "":
		errs = append(errs, required(endpoint, `name the parent, for example "registry.example.com"`))
	case r.ConnectionStringSecretRef != nil && r.Endpoint != "":
		errs = append(errs, forbidden(endpoint, "is in the connection string already: leave one of them out"))
	case r.Endpoint != "":
		if _, insecure, err := r.Address(); err != nil {
			errs = append(errs, field.Invalid(endpoint, field.OmitValueType{}, err.Error()))
		} else if r.Insecure && !insecure {
			errs = append(errs, forbidden(p.Child("insecure"), "contradicts the https:// of the endpoint: leave one of them out"))
		}
	}
	if r.ConnectionStringSecretRef != nil && r.Insecure {
		errs = append(errs, forbidden(p.Child("insecure"), "is in the connection string already, as ParentEndpointProtocol: leave it out"))
	}
	if r.CredentialsSecretRef != nil && r.ConnectionStringSecretRef != nil {
		errs = append(errs, forbidden(p.Child("credentialsSecretRef"), "cannot stand beside connectionStringSecretRef: leave one of them out"))
	}
	if r.AzureIdentity != nil && (r.CredentialsSecretRef != nil || r.ConnectionStringSecretRef != nil) {
		errs = append(errs, forbidden(p.Child("azureIdentity"), "cannot stand beside a Secret with credentials: leave one of them out"))
	}
	for name, ref := range map[string]*SecretRef{
		"credentialsSecretRef":      r.CredentialsSecretRef,
		"connectionStringSecretRef": r.ConnectionStringSecretRef,
		"caSecretRef":               r.CASecretRef,
	} {
		if ref != nil {
			errs = append(errs, ref.validate(p.Child(name))...)
		}
	}
	return errs
}

// Address is the parent's host, with its port if the endpoint names one, and
// whether it speaks plain HTTP. Its error never quotes the endpoint, which may
// hold credentials that do not belong there.
func (r *Parent) Address() (host string, insecure bool, err error) {
	host, insecure = r.Endpoint, r.Insecure
	if scheme, rest, found := strings.Cut(host, "://"); found {
		switch scheme {
		case "https":
			insecure = false
		case "http":
			insecure = true
		default:
			return "", false, errors.New("has a scheme that is neither https:// nor http://")
		}
		host = rest
	}
	host = strings.TrimSuffix(host, "/")
	switch {
	case strings.Contains(host, "@"):
		return "", false, errors.New("has credentials in it: put them into a Secret and name it in credentialsSecretRef")
	case strings.Contains(host, "/"):
		return "", false, errors.New("has a path in it: name the host here, and put the path into repositories[].name")
	}
	if err := validateHost(host); err != nil {
		return "", false, errors.New(`is not a host with or without a port: use for example "registry.example.com"`)
	}
	return host, insecure, nil
}

// validate quotes nothing: a Secret's content ends up here by mistake.
func (r *SecretRef) validate(p *field.Path) field.ErrorList {
	return r.validateAt(p.Child("name"))
}

func (r *SecretRef) validateAt(name *field.Path) field.ErrorList {
	if r.Name == "" {
		return field.ErrorList{required(name, "name a Secret")}
	}
	if len(validation.IsDNS1123Subdomain(r.Name)) > 0 {
		return field.ErrorList{field.Invalid(name, field.OmitValueType{}, "is not the name of a Secret: use lower-case letters, digits, '-' and '.'")}
	}
	return nil
}

// The grammar of repository names and tags (OCI distribution specification,
// "Pulling manifests"), and of platforms.
var (
	repositoryName = regexp.MustCompile(`\A[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\z`)
	tagName        = regexp.MustCompile(`\A[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}\z`)
	platformName   = regexp.MustCompile(`\A[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9]+)?\z`)
	tokenName      = regexp.MustCompile(`\A[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}\z`)
)

// ValidRepositoryName reports whether name is one that a repository can have.
func ValidRepositoryName(name string) bool {
	return len(name) <= 255 && repositoryName.MatchString(name)
}

// ValidTag reports whether tag is one that an image can have.
func ValidTag(tag string) bool { return tagName.MatchString(tag) }

func (r *Repository) validate(p *field.Path, parent *Parent) field.ErrorList {
	errs := validRepositoryGlob(p.Child("name"), r.Name)
	if len(errs) == 0 && parent != nil && isDockerHub(parent.Endpoint) && ValidRepositoryName(r.Name) && !strings.Contains(r.Name, "/") {
		errs = append(errs, invalid(p.Child("name"), r.Name, "is short for library/"+r.Name+" on Docker Hub: write it in full"))
	}
	errs = append(errs, validPrefix(p.Child("prefix"), r.Prefix)...)
	tags := p.Child("tags")
	for i, tag := range r.Tags.Include {
		errs = append(errs, validTagPattern(tags.Child("include").Index(i), tag)...)
	}
	for i, tag := range r.Tags.Exclude {
		errs = append(errs, validTagPattern(tags.Child("exclude").Index(i), tag)...)
	}
	if r.Tags.Newest < 0 {
		errs = append(errs, field.Invalid(tags.Child("newest"), r.Tags.Newest, fmt.Sprintf("%d is less than nothing: leave it out to keep all tags", r.Tags.Newest)))
	}
	for i, platform := range r.Platforms {
		if !platformName.MatchString(platform) {
			errs = append(errs, invalid(p.Child("platforms").Index(i), platform, `is not a platform: use for example "linux/amd64" or "linux/arm/v7"`))
		}
	}
	return errs
}

func isDockerHub(endpoint string) bool {
	host, _, err := (&Parent{Endpoint: endpoint}).Address()
	return err == nil && slices.Contains([]string{"docker.io", "index.docker.io", "registry-1.docker.io"}, host)
}

func validRepositoryGlob(p *field.Path, name string) field.ErrorList {
	if name == "" {
		return field.ErrorList{required(p, `name a repository, or "**" for all`)}
	}
	g, err := ParseGlob(name)
	if err != nil {
		return field.ErrorList{invalid(p, name, err.Error())}
	}
	if strings.ContainsFunc(name, func(r rune) bool { return r >= 'A' && r <= 'Z' }) {
		return field.ErrorList{invalid(p, name, "has upper-case letters, which no repository name has")}
	}
	if g.Literal() && !ValidRepositoryName(name) {
		return field.ErrorList{invalid(p, name, `is not a repository name: use for example "team/app"`)}
	}
	return nil
}

func validTagPattern(p *field.Path, pattern string) field.ErrorList {
	if _, err := ParseTagPattern(pattern); err != nil {
		return field.ErrorList{invalid(p, pattern, err.Error())}
	}
	return nil
}

func (s *Sync) validate(p *field.Path) field.ErrorList {
	var errs field.ErrorList
	if _, err := ParseSchedule(s.Schedule); err != nil {
		errs = append(errs, field.Invalid(p.Child("schedule"), s.Schedule, err.Error()))
	}
	if s.Window != "" {
		window, err := ParseDuration(s.Window)
		if err != nil {
			errs = append(errs, field.Invalid(p.Child("window"), s.Window, err.Error()))
		} else if window < MinWindow || window > MaxWindow {
			errs = append(errs, invalid(p.Child("window"), s.Window, "is not between PT1M and P7D"))
		}
	}
	errs = append(errs, validDuration(p.Child("messageTTL"), s.MessageTTL, 24*time.Hour, 90*24*time.Hour, "P1D and P90D")...)
	errs = append(errs, validQuantity(p.Child("maxBandwidth"), s.MaxBandwidth)...)
	if s.ChunkSizeInMb < 1 || s.ChunkSizeInMb > MaxChunkSizeInMb {
		errs = append(errs, field.Invalid(p.Child("chunkSizeInMb"), s.ChunkSizeInMb, fmt.Sprintf("%d is not between 1 and %d", s.ChunkSizeInMb, MaxChunkSizeInMb)))
	}
	if s.MaxRequestsPerHour < 0 {
		errs = append(errs, field.Invalid(p.Child("maxRequestsPerHour"), s.MaxRequestsPerHour, fmt.Sprintf("%d is less than nothing: leave it out for no limit", s.MaxRequestsPerHour)))
	}
	if s.Concurrency < 1 || s.Concurrency > MaxConcurrency {
		errs = append(errs, field.Invalid(p.Child("concurrency"), s.Concurrency, fmt.Sprintf("%d is not between 1 and %d", s.Concurrency, MaxConcurrency)))
	}
	if s.MaxRemovals < 1 || s.MaxRemovals > 100 {
		errs = append(errs, field.Invalid(p.Child("maxRemovals"), s.MaxRemovals, fmt.Sprintf("%d is not a percentage from 1 to 100", s.MaxRemovals)))
	}
	return errs
}

func validTokens(p *field.Path, tokens []ClientToken) field.ErrorList {
	var errs field.ErrorList
	seen := make(map[string]bool)
	for i := range tokens {
		t, p := &tokens[i], p.Index(i)
		switch {
		case t.Name == "":
			errs = append(errs, required(p.Child("name"), "name the token"))
		case !tokenName.MatchString(t.Name):
			errs = append(errs, invalid(p.Child("name"), t.Name, "is not a name for a token: use letters, digits, '.', '_' and '-'"))
		case seen[t.Name]:
			errs = append(errs, field.Duplicate(p.Child("name"), t.Name))
			errs[len(errs)-1].Detail = fmt.Sprintf("%q names another token already", t.Name)
		}
		seen[t.Name] = true
		errs = append(errs, t.SecretRef.validate(p.Child("secretRef"))...)
		if len(t.ScopeMap) == 0 {
			errs = append(errs, required(p.Child("scopeMap"), "say what the token may do"))
		}
		for j := range t.ScopeMap {
			errs = append(errs, t.ScopeMap[j].validate(p.Child("scopeMap").Index(j))...)
		}
	}
	return errs
}

func (s *Scope) validate(p *field.Path) field.ErrorList {
	var errs field.ErrorList
	if len(s.Repositories) == 0 {
		errs = append(errs, required(p.Child("repositories"), `name repositories, or "**" for all`))
	}
	for i, name := range s.Repositories {
		errs = append(errs, validRepositoryGlob(p.Child("repositories").Index(i), name)...)
	}
	if len(s.Actions) == 0 {
		errs = append(errs, required(p.Child("actions"), "name what is allowed, for example content/read"))
	}
	for i, action := range s.Actions {
		errs = append(errs, oneOf(p.Child("actions").Index(i), action,
			ActionContentRead, ActionContentWrite, ActionContentDelete, ActionMetadataRead, ActionMetadataWrite)...)
	}
	return errs
}

func validMirrors(p *field.Path, mirrors []Mirror) field.ErrorList {
	var errs field.ErrorList
	seen := make(map[string]bool)
	for i, m := range mirrors {
		for j, f := range m.Prefetch {
			if len(f.Images) == 0 {
				errs = append(errs, required(p.Index(i).Child("prefetch").Index(j).Child("images"), "name the images to bring"))
			}
		}
		p := p.Index(i).Child("registry")
		switch {
		case m.Registry == "":
			errs = append(errs, required(p, `name a registry as image names do, for example "docker.io"`))
		case seen[m.Registry]:
			errs = append(errs, field.Duplicate(p, m.Registry))
			errs[len(errs)-1].Detail = fmt.Sprintf("%q is in the list already", m.Registry)
		default:
			errs = append(errs, validHost(p, m.Registry)...)
		}
		seen[m.Registry] = true
	}
	return errs
}

func validQuantity(p *field.Path, q *resource.Quantity) field.ErrorList {
	if q != nil && q.Sign() <= 0 {
		return field.ErrorList{invalid(p, q.String(), "is not more than nothing")}
	}
	return nil
}

func validHost(p *field.Path, host string) field.ErrorList {
	if strings.Contains(host, "://") || strings.Contains(host, "/") || strings.Contains(host, "@") {
		return field.ErrorList{field.Invalid(p, field.OmitValueType{}, "is more than a host: leave out the scheme, the path and credentials")}
	}
	if err := validateHost(host); err != nil {
		return field.ErrorList{invalid(p, host, `is not a host with or without a port: use for example "registry.example.com:5000"`)}
	}
	return nil
}

// validateHost reports whether hostport is a DNS name or an IP address (version
// 6 in brackets), with or without a port.
func validateHost(hostport string) error {
	host := hostport
	if i := strings.LastIndexByte(hostport, ':'); i > strings.LastIndexByte(hostport, ']') {
		var port string
		var err error
		if host, port, err = net.SplitHostPort(hostport); err != nil {
			return err
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("%s is not a port", port)
		}
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
	}
	if inner, ok := strings.CutPrefix(host, "["); ok {
		addr, err := netip.ParseAddr(strings.TrimSuffix(inner, "]"))
		if err != nil || !addr.Is6() || addr.Zone() != "" || !strings.HasSuffix(host, "]") {
			return errors.New("not an IPv6 address in brackets")
		}
		return nil
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return nil
	}
	if len(validation.IsDNS1123Subdomain(strings.ToLower(host))) > 0 {
		return errors.New("not a DNS name")
	}
	return nil
}

func oneOf[T ~string](p *field.Path, value T, allowed ...T) field.ErrorList {
	if slices.Contains(allowed, value) {
		return nil
	}
	names := make([]string, len(allowed))
	for i, a := range allowed {
		names[i] = string(a)
	}
	err := field.NotSupported(p, value, names)
	err.Detail = fmt.Sprintf("%q is not one of %s", value, strings.Join(names, ", "))
	return field.ErrorList{err}
}

func invalid(p *field.Path, value, what string) *field.Error {
	return field.Invalid(p, value, fmt.Sprintf("%q %s", value, what))
}

func required(p *field.Path, remedy string) *field.Error {
	return field.Required(p, "is required: "+remedy)
}

func forbidden(p *field.Path, what string) *field.Error { return field.Forbidden(p, what) }
