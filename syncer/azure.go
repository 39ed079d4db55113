package syncer

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

// azureIdentity gets an Azure container registry's refresh token for the identity
// that this machine or pod has: a token of Microsoft Entra ID, from the pod's
// workload identity or from the instance metadata service, is exchanged at the
// registry (Azure container registry's authentication, "AAD-OAuth",
// POST /oauth2/exchange). What follows is the common way with a refresh token.
type azureIdentity struct {
	// registry is the registry's login server, and how it is reached.
	registry string
	insecure bool
	ca       *x509.CertPool
	// clientID chooses one of several identities. Empty: see the API.
	clientID string
	// metadata is the instance metadata service. Empty: Azure's.
	metadata string
	// environment reads the variables that the workload identity webhook sets.
	environment func(string) string
	limits      limits

	mu      sync.Mutex
	token   string    // guarded by mu
	expires time.Time // guarded by mu
}

// azureAudience is what a token for container registries is for, in all of
// Azure's clouds.
const azureAudience = "https://containerregistry.azure.net"

const azureMetadata = "http://169.254.169.254"

// newAzureIdentity prepares asking for an identity's credentials for a registry.
func newAzureIdentity(registry Parent, clientID string) *azureIdentity {
	return &azureIdentity{
		registry:    registry.Endpoint,
		insecure:    registry.Insecure,
		ca:          registry.CA,
		clientID:    clientID,
		environment: os.Getenv,
		limits:      defaultLimits(),
	}
}

// credentials is a Parent's Credentials.
func (z *azureIdentity) credentials(ctx context.Context) (username, password string, err error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if time.Now().Before(z.expires) {
		return "", z.token, nil
	}
	token, err := z.entraToken(ctx)
	if err != nil {
		return "", "", err
	}
	if z.token, err = z.exchange(ctx, token); err != nil {
		return "", "", err
	}
	z.expires = expiry(z.token, time.Now())
	return "", z.token, nil
}

// entraToken gets a token of Microsoft Entra ID.
func (z *azureIdentity) entraToken(ctx context.Context) (string, error) {
	file, tenant := z.environment("AZURE_FEDERATED_TOKEN_FILE"), z.environment("AZURE_TENANT_ID")
	clientID := cmp.Or(z.clientID, z.environment("AZURE_CLIENT_ID"))
	if file != "" && tenant != "" && clientID != "" {
		return z.workloadToken(ctx, file, tenant, clientID)
	}
	return z.metadataToken(ctx)
}

// workloadToken exchanges the token that Kubernetes gave the pod (Microsoft
// identity platform, "Client credentials flow", third case).
func (z *azureIdentity) workloadToken(ctx context.Context, file, tenant, clientID string) (string, error) {
	assertion, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("reading the pod's token for its workload identity: %w", err)
	}
	authority := strings.TrimSuffix(cmp.Or(z.environment("AZURE_AUTHORITY_HOST"), "https://login.microsoftonline.com"), "/")
	return z.post(ctx, azureQuestion{
		who:  "Microsoft Entra ID at " + hostOfURL(authority),
		what: "the workload identity " + clientID,
		url:  authority + "/" + url.PathEscape(tenant) + "/oauth2/v2.0/token",
		form: url.Values{
			"grant_type":            {"client_credentials"},
			"client_id":             {clientID},
			"scope":                 {azureAudience + "/.default"},
			"client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"},
			"client_assertion":      {strings.TrimSpace(string(assertion))},
		},
		key:    "access_token",
		remedy: "check the identity's federated credential and that it names this pod's service account",
	})
}

// metadataToken asks the machine for its managed identity's token.
func (z *azureIdentity) metadataToken(ctx context.Context) (string, error) {
	query := url.Values{"api-version": {"2018-02-01"}, "resource": {azureAudience}}
	if z.clientID != "" {
		query.Set("client_id", z.clientID)
	}
	return z.post(ctx, azureQuestion{
		who:    "Azure's instance metadata service",
		what:   "the managed identity " + cmp.Or(z.clientID, "of this machine"),
		url:    cmp.Or(z.metadata, azureMetadata) + "/metadata/identity/oauth2/token?" + query.Encode(),
		key:    "access_token",
		local:  true,
		remedy: "assign the identity to this machine, or give the pod a workload identity, or correct spec.parent.azureIdentity.clientID",
	})
}

// exchange gets the registry's refresh token for one of Microsoft Entra ID.
func (z *azureIdentity) exchange(ctx context.Context, token string) (string, error) {
	scheme := "https://"
	if z.insecure {
		scheme = "http://"
	}
	form := url.Values{"grant_type": {"access_token"}, "service": {z.registry}, "access_token": {token}}
	if tenant := z.environment("AZURE_TENANT_ID"); tenant != "" {
		form.Set("tenant", tenant)
	}
	return z.post(ctx, azureQuestion{
		who:    "parent " + z.registry,
		what:   "the identity",
		url:    scheme + z.registry + "/oauth2/exchange",
		form:   form,
		key:    "refresh_token",
		remedy: "give it the role AcrPull on the registry",
	})
}

// azureQuestion asks for a token.
type azureQuestion struct {
	who, what string
	url       string
	form      url.Values // nil: it is asked with GET
	key       string     // of the answer's object
	local     bool       // not by way of a proxy
	remedy    string     // when it is refused
}

// maxToken bounds an answer that holds one.
const maxToken = 1 << 20

func (z *azureIdentity) post(ctx context.Context, q azureQuestion) (string, error) {
	whole := ctx
	ctx, cancel := context.WithTimeout(ctx, z.limits.header)
	defer cancel()
	method, body := http.MethodGet, io.Reader(nil)
	if q.form != nil {
		method, body = http.MethodPost, strings.NewReader(q.form.Encode())
	}
	req, err := http.NewRequestWithContext(ctx, method, q.url, body)
	if err != nil {
		return "", unusable(q.who, q.what, "%s", oneLine(err.Error()))
	}
	req.Header.Set("User-Agent", userAgent)
	if q.form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	} else {
		req.Header.Set("Metadata", "true")
	}
	resp, err := z.client(q).Do(req)
	if whole.Err() != nil {
		return "", context.Cause(whole)
	}
	if err != nil {
		f := unreachable(q.who, q.what, z.limits, err)
		if q.local {
			f.message += ": " + q.remedy
		}
		return "", f
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", q.refused(resp)
	}
	var answer map[string]json.RawMessage
	var token string
	if json.NewDecoder(io.LimitReader(resp.Body, maxToken)).Decode(&answer) != nil || json.Unmarshal(answer[q.key], &token) != nil || token == "" {
		return "", unusable(q.who, q.what, "it is not a token")
	}
	return token, nil
}

// client speaks to one service once. It follows no redirects, which would take
// tokens along.
func (z *azureIdentity) client(q azureQuestion) *http.Client {
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{MinVersion: tls.VersionTLS12},
		DisableKeepAlives: true,
	}
	if !q.local {
		transport.Proxy = http.ProxyFromEnvironment
	}
	if q.key == "refresh_token" {
		transport.TLSClientConfig.RootCAs = z.ca
	}
	return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}
}

// refused says why there is no token. Of what the service says only the code is
// repeated, since the rest may quote what it was sent.
func (q azureQuestion) refused(resp *http.Response) error {
	f := refusal(q.who, q.what, resp, true)
	if f.temporary {
		return f
	}
	f.message = fmt.Sprintf("%s refuses %s (%d): %s", q.who, q.what, f.status, q.remedy)
	return f
}

// expiry says until when a registry's token is used: well before the time that it
// names as its end, if it does (RFC 7519, section 4.1.4).
func expiry(token string, now time.Time) time.Time {
	var claims struct {
		Expires int64 `json:"exp"`
	}
	if parts := strings.Split(token, "."); len(parts) == 3 {
		if payload, err := base64.RawURLEncoding.DecodeString(parts[1]); err == nil {
			_ = json.Unmarshal(payload, &claims) // what cannot be read has no end
		}
	}
	if end := time.Unix(claims.Expires, 0); end.After(now) {
		return now.Add(end.Sub(now) * 3 / 4)
	}
	return now
}

func hostOfURL(s string) string {
	if u, err := url.Parse(s); err == nil && u.Host != "" {
		return u.Host
	}
	return s
}
