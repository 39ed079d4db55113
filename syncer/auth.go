package syncer

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

// authorizer answers the parent's challenges: Basic, or Bearer with tokens from
// the service that the parent names (distribution's token authentication
// specification). A token is fetched once for each scope, however many requests
// wait for it, and again shortly before it expires. Credentials go to the
// parent and to that service, to nobody else.
type authorizer struct {
	client   *http.Client
	config   Parent
	host     string // of the parent
	insecure bool
	limits   limits

	mu sync.Mutex
	// username and password are what config's Credentials gave when they were
	// asked last.
	username, password string
	asked              time.Time
	scheme             auth.AuthenticationScheme // 0 until the first challenge
	bearer             auth.TokenOptions
	tokens             map[string]*token // by scope
}

// token is a bearer token for one scope.
type token struct {
	busy    chan struct{} // holds a value while the token is being fetched
	value   string
	expires time.Time
}

// known reports whether there are credentials to send.
func (a *authorizer) known() bool {
	return a.config.Credentials != nil || a.config.Username != "" || a.config.Password != ""
}

// keepCredentials is how long credentials are used that do not last. They last
// longer than this.
const keepCredentials = 5 * time.Minute

// credentials are what is to be sent to whom the parent trusts with it.
func (a *authorizer) credentials(ctx context.Context) (username, password string, err error) {
	if a.config.Credentials == nil {
		return a.config.Username, a.config.Password, nil
	}
	a.mu.Lock()
	username, password = a.username, a.password
	old := time.Since(a.asked) >= keepCredentials
	a.mu.Unlock()
	if !old {
		return username, password, nil
	}
	if username, password, err = a.config.Credentials(ctx); err != nil {
		return "", "", err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.username, a.password, a.asked = username, password, time.Now()
	return username, password, nil
}

// authorize adds what the parent is known to want to req, with a token for scope
// other than stale, and returns the header it added.
func (a *authorizer) authorize(ctx context.Context, req *http.Request, scope, stale string) (string, error) {
	a.mu.Lock()
	scheme := a.scheme
	a.mu.Unlock()
	switch {
	case scope == "": // a question that anyone may ask
	case scheme == auth.BasicAuth:
		username, password, err := a.credentials(ctx)
		if err != nil {
			return "", err
		}
		req.SetBasicAuth(username, password)
	case scheme == auth.BearerAuth:
		value, err := a.token(ctx, scope, strings.TrimPrefix(stale, "Bearer "))
		if err != nil {
			return "", err
		}
		req.Header.Set("Authorization", "Bearer "+value)
	}
	return req.Header.Get("Authorization"), nil
}

// challenged takes note of what a 401 wants. It reports whether that is
// something other than the Authorization header that the request bore.
func (a *authorizer) challenged(ctx context.Context, resp *http.Response, used string) (bool, error) {
	username, password, err := a.credentials(ctx)
	if err != nil {
		return false, err
	}
	challenges := auth.ParseAuthHeader(resp.Header)
	i := slices.IndexFunc(challenges, func(c auth.Challenge) bool {
		return c.Scheme == auth.BearerAuth || c.Scheme == auth.BasicAuth && username != ""
	})
	if i < 0 {
		return false, nil
	}
	var options auth.TokenOptions
	if challenges[i].Scheme == auth.BearerAuth {
		if options, err = auth.GenerateTokenOptions(ctx, a.host, username, password, challenges[i]); err != nil {
			return false, unusable("parent "+a.host, "authentication", "%s", oneLine(err.Error()))
		}
		if err := a.checkRealm(options.Realm); err != nil {
			return false, err
		}
	}
	a.mu.Lock()
	a.scheme, a.bearer = challenges[i].Scheme, options
	a.mu.Unlock()
	return challenges[i].Scheme == auth.BearerAuth || used == "", nil
}

// checkRealm refuses to send credentials in the clear when the parent itself is
// spoken to over TLS.
func (a *authorizer) checkRealm(realm string) error {
	u, err := url.Parse(realm)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return unusable("parent "+a.host, "authentication", "its token service is not a URL")
	}
	if u.Scheme == "http" && !a.insecure && a.known() {
		return unusable("parent "+a.host, "authentication", "its token service %s would get the credentials over plain HTTP", u.Host)
	}
	return nil
}

// token returns a token for scope other than stale, fetching one if need be.
func (a *authorizer) token(ctx context.Context, scope, stale string) (string, error) {
	a.mu.Lock()
	options := a.bearer
	t := a.tokens[scope]
	if t == nil {
		t = &token{busy: make(chan struct{}, 1)}
		a.tokens[scope] = t
	}
	a.mu.Unlock()

	select {
	case t.busy <- struct{}{}:
		defer func() { <-t.busy }()
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	if t.value != "" && t.value != stale && time.Now().Before(t.expires) {
		return t.value, nil
	}
	options.Scopes = []string{scope}
	value, lifetime, err := a.fetch(ctx, options)
	if err != nil {
		return "", err
	}
	t.value, t.expires = value, time.Now().Add(lifetime)
	return value, nil
}

// fetch asks the token service. An identity token is exchanged with a POST; a
// user name and password are sent with a GET, which every service takes.
func (a *authorizer) fetch(ctx context.Context, options auth.TokenOptions) (value string, lifetime time.Duration, err error) {
	if options.Username, options.Secret, err = a.credentials(ctx); err != nil {
		return "", 0, err
	}
	whole := ctx
	ctx, cancel := context.WithTimeout(ctx, a.limits.answer)
	defer cancel()
	var seconds int
	if options.Username == "" && options.Secret != "" {
		var resp *auth.OAuthTokenResponse
		if resp, err = auth.FetchTokenWithOAuth(ctx, a.client, nil, userAgent, options); err == nil {
			value, seconds = resp.AccessToken, resp.ExpiresInSeconds
		}
	} else {
		var resp *auth.FetchTokenResponse
		if resp, err = auth.FetchToken(ctx, a.client, nil, options); err == nil {
			value, seconds = resp.Token, resp.ExpiresInSeconds
		}
	}
	if err != nil {
		return "", 0, a.explain(whole, options, err)
	}
	if seconds <= 0 {
		seconds = 60 // what the specification says a missing expires_in means
	}
	// A request takes its time to arrive: renew before it is too late.
	return value, time.Duration(seconds) * time.Second * 9 / 10, nil
}

func (a *authorizer) explain(ctx context.Context, options auth.TokenOptions, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	who := fmt.Sprintf("parent %s", a.host)
	if u, uerr := url.Parse(options.Realm); uerr == nil && u.Host != a.host {
		who += "'s token service " + u.Host
	}
	what := strings.Join(options.Scopes, " ")
	if status, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok {
		resp := &http.Response{StatusCode: status.StatusCode, Header: http.Header{}, Body: http.NoBody}
		return refusal(who, what, resp, a.known())
	}
	if _, ok := errors.AsType[*url.Error](err); ok {
		f := unreachable(who, what, a.limits, err)
		f.down = true // without tokens, nothing can be asked of the parent either
		return f
	}
	// The decoder's complaints can quote the answer, and that may be a token.
	return unusable(who, what, "it is not a token")
}
