package node

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	hostsconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/distribution/reference"
	"github.com/pelletier/go-toml/v2"

	"github.com/connected-registry/connected-registry/trust"
)

// probeTime bounds one question to a host.
const probeTime = 5 * time.Second

// Host is one that is asked for an image.
type Host struct {
	URL string `json:"url"`
	// Capabilities that the runtime uses it for: pull, resolve, push.
	Capabilities []string `json:"capabilities"`
	Verdict      Verdict  `json:"verdict"`
	// Answer is what it said, or why it could not be asked.
	Answer string `json:"answer"`
	// Remedy is what to do. Empty if nothing is.
	Remedy string `json:"remedy,omitempty"`
}

// Route is the way of an image to a node.
type Route struct {
	// Image is the reference in full, Registry its host.
	Image    string `json:"image"`
	Registry string `json:"registry"`
	// File is the hosts.toml that decides, inside the node root. Empty: none.
	File string `json:"file,omitempty"`
	// Hosts in the order in which they are asked.
	Hosts []Host `json:"hosts"`
	// DependsOnMirror says that nobody but the mirror has the image: while it is
	// away, a node can only start what it already holds. The mirror's own images
	// must not be so.
	DependsOnMirror bool `json:"dependsOnMirror"`
	// Verdict is that of the best host: one that answers is enough.
	Verdict Verdict `json:"verdict"`
}

// FindRoute reads, with containerd's own code, which hosts are asked for an
// image on the node whose file system is at nodeRoot, and asks each of them once
// whether it is there and its certificate verifies. Errors: the reference does
// not parse, or the host configuration makes every pull fail.
func FindRoute(ctx context.Context, nodeRoot string, d Detection, image string) (Route, error) {
	named, err := reference.ParseDockerRef(image)
	if err != nil {
		return Route{}, fmt.Errorf("image %q: %w", image, err)
	}
	route := Route{Image: named.String(), Registry: reference.Domain(named)}
	certs := filepath.Join(nodeRoot, d.CertsDir)
	options := hostsconfig.HostOptions{}
	if d.readsHosts {
		options.HostDir = hostsconfig.HostDirFromRoot(certs)
		if dir, err := options.HostDir(route.Registry); err == nil && dir != "" {
			route.File = "/" + strings.TrimPrefix(path.Join(strings.TrimPrefix(dir, filepath.Clean(nodeRoot)), "hosts.toml"), "/")
		}
	}
	hosts, err := hostsconfig.ConfigureHosts(ctx, options)(route.Registry)
	if err != nil {
		return route, fmt.Errorf("every pull from %s fails: %s: %w: put the file right, or remove it", route.Registry, route.File, err)
	}
	mirrors := mirrorHosts(certs)
	route.DependsOnMirror = len(hosts) > 0
	route.Verdict = Fault
	for _, h := range hosts {
		found := probe(ctx, h)
		if route.Verdict.worse(found.Verdict) {
			route.Verdict = found.Verdict
		}
		route.Hosts = append(route.Hosts, found)
		route.DependsOnMirror = route.DependsOnMirror && mirrors[h.Host]
	}
	return route, nil
}

// probe asks a host what every registry answers.
func probe(ctx context.Context, h docker.RegistryHost) Host {
	found := Host{URL: h.Scheme + "://" + h.Host + h.Path, Verdict: OK}
	for _, c := range []struct {
		capability docker.HostCapabilities
		name       string
	}{{docker.HostCapabilityPull, "pull"}, {docker.HostCapabilityResolve, "resolve"}, {docker.HostCapabilityPush, "push"}} {
		if h.Capabilities.Has(c.capability) {
			found.Capabilities = append(found.Capabilities, c.name)
		}
	}
	status, err := ask(ctx, h.Client, found.URL+"/")
	switch {
	case err != nil:
		found.Answer, found.Remedy = explain(err, h.Host)
		found.Verdict = Fault
	case status >= 500 || status == http.StatusTooManyRequests:
		found.Answer, found.Verdict, found.Remedy = fmt.Sprintf("answers %d", status), Warning, "look at its log"
	default:
		found.Answer = fmt.Sprintf("answers %d", status)
		if strings.HasPrefix(found.URL, "https:") {
			found.Answer += ", its certificate verifies"
		}
	}
	return found
}

func ask(ctx context.Context, client *http.Client, target string) (status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	defer client.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return 0, err
	}
	answer, err := client.Do(request)
	if err != nil {
		return 0, err
	}
	defer answer.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(answer.Body, 64<<10))
	return answer.StatusCode, nil
}

// explain says what is wrong in a few words, and what to do.
func explain(err error, host string) (answer, remedy string) {
	var unknown x509.UnknownAuthorityError
	var hostname x509.HostnameError
	var invalid x509.CertificateInvalidError
	var dns *net.DNSError
	switch {
	case errors.As(err, &unknown):
		return "its certificate is of an authority that is not trusted", "give the CA of " + host + " in trustDistribution.caSecrets"
	case errors.As(err, &hostname):
		return "its certificate is for other names", "serve a certificate that names " + host
	case errors.As(err, &invalid):
		return "its certificate is not valid: " + invalid.Error(), "renew the certificate of " + host + ", and check this node's clock"
	case errors.As(err, &dns):
		return "its name is not known", "check this node's name servers, or use an address"
	case errors.Is(err, syscall.ECONNREFUSED) && isLoopback(host):
		return "refuses connections", "the node's cache does not run: look at the agent of this node"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refuses connections", "start it, or correct its address"
	case errors.Is(err, context.DeadlineExceeded), os.IsTimeout(err):
		return fmt.Sprintf("does not answer within %v", probeTime), "check routes and firewalls from this node to " + host
	}
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	return err.Error(), "check the way from this node to " + host
}

func isLoopback(host string) bool {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = host
	}
	ip := net.ParseIP(strings.Trim(name, "[]"))
	return name == "localhost" || ip != nil && ip.IsLoopback()
}

// mirrorHosts are the hosts[:port] of the mirror, by our own hosts.toml files: the
// node's cache and the registry. Where the cache is the only hop, the server is the
// registry.
func mirrorHosts(certs string) map[string]bool {
	found := map[string]bool{}
	entries, _ := os.ReadDir(certs)
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(certs, e.Name(), "hosts.toml"))
		if err != nil || !strings.HasPrefix(string(text), trust.Marker) {
			continue
		}
		var file struct {
			Server string         `toml:"server"`
			Host   map[string]any `toml:"host"`
		}
		if toml.Unmarshal(text, &file) != nil {
			continue
		}
		beyond := false
		for u := range file.Host {
			found[hostOf(u)] = true
			beyond = beyond || !isLoopback(hostOf(u))
		}
		if !beyond && len(file.Host) < 2 {
			found[hostOf(file.Server)] = true
		}
	}
	delete(found, "")
	return found
}

func hostOf(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return ""
	}
	return u.Host
}
