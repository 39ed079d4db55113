package auth

import (
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
)

// service is the name under which tokens are asked for and issued.
const service = "connected-registry"

// pollInterval is how often the token directory is read again. Watching it would
// have to follow the symbolic links by which a mounted Secret is exchanged.
const pollInterval = 5 * time.Second

// Config says whom the registry knows.
type Config struct {
	// Dir holds one file for each client token, see clienttoken.File. It is read
	// again when it changes; what cannot be read leaves the token as it was.
	// Empty: there are no client tokens.
	Dir string
	// Secret is what the key for bearer tokens is derived from. All replicas
	// need the same one, of 16 bytes or more. Empty: a random one, so that
	// only this process accepts its tokens.
	Secret []byte
	// AnonymousPull is asked whether clients without credentials may read; it
	// may change at any time. Nil: they may not.
	AnonymousPull func() bool
	// AnonymousPullFor is asked whether clients without credentials may read
	// content of a repository when they ask for it on behalf of another
	// registry's name (?ns=), where AnonymousPull does not allow it. It is never
	// asked about lists, nor with one of the registry's own names. Nil: they
	// may not.
	AnonymousPullFor func(registry, repository string) bool
	// Hosts gives the registry's names, with port, as they stand in image names.
	// A request that containerd makes on behalf of another registry's name
	// (?ns=) is never challenged, for the credentials that would come are
	// meant for that other registry. Nil: only the name that a request came to.
	Hosts func() []string
	// Logger is told of logins that fail and of token files that cannot be
	// used. Nil discards it.
	Logger *slog.Logger
}

// Authority decides who may do what. Its methods may be called concurrently.
type Authority struct {
	cfg      Config
	log      *slog.Logger
	signer   signer
	checker  *checker
	limiter  *limiter
	logins   singleflight.Group
	tokens   atomic.Pointer[tokenSet]
	lastFail string // owned by whoever reads the directory: New, then Watch
}

// New validates the configuration and reads the tokens. It starts nothing. A
// token file that cannot be used is reported to the log; the others work.
func New(cfg Config) (*Authority, error) {
	if n := len(cfg.Secret); n > 0 && n < 16 {
		return nil, fmt.Errorf("secret for client tokens has %d bytes; use 16 or more, for example from `openssl rand -hex 32`", n)
	}
	a := &Authority{
		cfg:     cfg,
		log:     cfg.Logger,
		checker: newChecker(max(1, runtime.GOMAXPROCS(0)/2)),
		limiter: newLimiter(),
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if a.cfg.AnonymousPull == nil {
		a.cfg.AnonymousPull = func() bool { return false }
	}
	secret := cfg.Secret
	if len(secret) == 0 {
		secret = make([]byte, 32)
		rand.Read(secret)
	}
	key, err := hkdf.Key(sha256.New, secret, nil, "connected-registry bearer tokens v1", 32)
	if err != nil {
		return nil, fmt.Errorf("deriving the key for bearer tokens: %w", err)
	}
	a.signer = signer{key}
	a.tokens.Store(&tokenSet{unknown: unknownPassword(nil)})
	a.reload()
	return a, nil
}

// Watch reads the tokens again when they change, until ctx ends.
func (a *Authority) Watch(ctx context.Context) {
	if a.cfg.Dir == "" {
		return
	}
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			a.reload()
		}
	}
}

func (a *Authority) reload() {
	if a.cfg.Dir == "" {
		return
	}
	now, changed, err := readTokens(a.cfg.Dir, *a.tokens.Load())
	a.tokens.Store(&now)
	fail := ""
	if err != nil {
		fail = err.Error()
	}
	if fail != a.lastFail && err != nil {
		a.log.Error("client tokens cannot all be used; those that cannot stay as they were", "error", err)
	}
	a.lastFail = fail
	if changed {
		a.log.Info("client tokens loaded", "tokens", len(now.tokens))
	}
}

// Need is access that a request needs: one of the actions, on one repository.
type Need struct {
	Repository string
	AnyOf      []v1alpha1.Action
}

// Catalogue is the need of a request for the list of repositories.
var catalogue = Need{}

// Identity is who makes a request.
type Identity struct {
	token     *token // nil: anonymous
	claims    *claims
	anonymous bool // anonymous reading is allowed
}

// Name is the token's name; empty for a client without credentials.
func (id Identity) Name() string {
	if id.token == nil {
		return ""
	}
	return id.token.name
}

// May reports whether the client may do action on a repository with the
// credentials that it showed.
func (id Identity) May(repository string, action v1alpha1.Action) bool {
	return id.allows(repository, action) && id.covers(repository, action)
}

// Sees reports whether a repository is on the list of repositories for the
// client.
func (id Identity) Sees(repository string) bool {
	return id.allows(repository, v1alpha1.ActionMetadataRead)
}

// allows reports whether the scope map, or anonymous reading, allows action.
func (id Identity) allows(repository string, action v1alpha1.Action) bool {
	if id.token != nil && id.token.scopes.allows(repository, action) {
		return true
	}
	return id.anonymous && isRead(action)
}

// covers reports whether the credentials extend to action: a bearer token is
// issued for some of what its client may do.
func (id Identity) covers(repository string, action v1alpha1.Action) bool {
	return id.claims == nil || id.claims.covers(repository, action) || id.anonymous && isRead(action)
}

func isRead(a v1alpha1.Action) bool {
	return a == v1alpha1.ActionContentRead || a == v1alpha1.ActionMetadataRead
}

// ChallengeError refuses a request that could be allowed with other
// credentials: 401 UNAUTHORIZED.
type ChallengeError struct {
	// Header is the value of WWW-Authenticate. Empty: the client must not be
	// challenged.
	Header string
	reason string
}

func (e *ChallengeError) Error() string { return e.reason }

// DeniedError refuses a request that these credentials cannot have: 403 DENIED.
type DeniedError struct{ reason string }

func (e *DeniedError) Error() string { return e.reason }

// Authorize finds out who makes the request, and whether they may have all that
// it needs. The errors are *ChallengeError and *DeniedError; their text is for
// the client.
func (a *Authority) Authorize(r *http.Request, needs ...Need) (Identity, error) {
	if a.mirrored(r, needs) {
		// Credentials that come along are that other registry's, and none of
		// our business.
		return Identity{}, nil
	}
	id, err := a.identify(r)
	if err != nil {
		if id.anonymous && readsOnly(needs) {
			// A client that was given credentials for something else must
			// not be worse off than one without.
			return Identity{anonymous: true}, nil
		}
		return Identity{}, a.challenge(r, needs, "", err.Error())
	}
	for _, need := range needs {
		may := func(a v1alpha1.Action) bool { return id.May(need.Repository, a) }
		allowed := func(a v1alpha1.Action) bool { return id.allows(need.Repository, a) }
		switch {
		case slices.ContainsFunc(need.AnyOf, may):
		case slices.ContainsFunc(need.AnyOf, allowed):
			return id, a.challenge(r, needs, "insufficient_scope", "the bearer token was not issued for this")
		case id.token == nil:
			return id, a.challenge(r, needs, "", "authentication required")
		default:
			return id, &DeniedError{fmt.Sprintf("client token %q has no %s on repository %s", id.token.name, need.AnyOf[0], need.Repository)}
		}
	}
	return id, nil
}

// AuthorizeBase decides about /v2/, which is where clients learn how to log in,
// and whether they are: it takes an identity, but no anonymous one as long as
// there is another to be had.
func (a *Authority) AuthorizeBase(r *http.Request) (Identity, error) {
	id, err := a.identify(r)
	switch {
	case err != nil:
		return Identity{}, a.challenge(r, nil, "", err.Error())
	case id.token != nil, id.anonymous && (id.claims != nil || len(a.tokens.Load().tokens) == 0):
		return id, nil
	default:
		return Identity{}, a.challenge(r, nil, "", "authentication required")
	}
}

// AuthorizeCatalogue decides about the list of repositories. Which of them are
// on it is for the caller to filter, by Identity.Sees.
func (a *Authority) AuthorizeCatalogue(r *http.Request) (Identity, error) {
	id, err := a.identify(r)
	switch {
	case err != nil && id.anonymous:
		return Identity{anonymous: true}, nil
	case err != nil:
		return Identity{}, a.challenge(r, []Need{catalogue}, "", err.Error())
	case id.token == nil && !id.anonymous:
		return Identity{}, a.challenge(r, []Need{catalogue}, "", "authentication required")
	case id.token != nil && id.claims != nil && !id.claims.coversCatalogue():
		return id, a.challenge(r, []Need{catalogue}, "insufficient_scope", "the bearer token was not issued for this")
	}
	return id, nil
}

func readsOnly(needs []Need) bool {
	for _, need := range needs {
		if !slices.ContainsFunc(need.AnyOf, isRead) {
			return false
		}
	}
	return true
}

// identify finds out who makes a request. Without credentials that is the
// anonymous identity. With an error, the identity still says whether anonymous
// reading is allowed.
func (a *Authority) identify(r *http.Request) (Identity, error) {
	id := Identity{anonymous: a.cfg.AnonymousPull()}
	header := r.Header.Get("Authorization")
	if header == "" {
		return id, nil
	}
	if name, password, ok := r.BasicAuth(); ok {
		t, _, err := a.login(name, password, r.RemoteAddr)
		if err != nil {
			return id, err
		}
		id.token = t
		return id, nil
	}
	scheme, text, _ := strings.Cut(header, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return id, errors.New("the Authorization header is neither Basic nor Bearer")
	}
	c, err := a.signer.verify(strings.TrimSpace(text), time.Now())
	if err != nil {
		return id, err
	}
	id.claims = c
	if c.Subject == "" {
		return id, nil
	}
	t := a.tokens.Load().tokens[c.Subject]
	if t == nil || !slices.ContainsFunc(t.passwords, func(h clienttoken.Hash) bool { return passwordID(h) == c.Key }) {
		return Identity{anonymous: id.anonymous}, errBearer
	}
	id.token = t
	return id, nil
}

// errLogin is the one answer to a wrong name and to a wrong password.
var errLogin = errors.New("unknown client token or wrong password")

// tooManyError refuses a login without looking at it.
type tooManyError struct{ wait time.Duration }

func (e *tooManyError) Error() string {
	return fmt.Sprintf("too many failed logins; try again in %d seconds", e.seconds())
}

func (e *tooManyError) seconds() int { return int((e.wait + time.Second - 1) / time.Second) }

// login checks a name and password, and returns the token and which of its
// passwords it was. Many who come with the same ones at the same time wait for
// one answer.
func (a *Authority) login(name, password, remote string) (*token, clienttoken.Hash, error) {
	t := a.tokens.Load().tokens[name]
	if t != nil {
		for _, h := range t.passwords {
			if a.checker.remembered(h, password) {
				return t, h, nil
			}
		}
	}
	sum := a.checker.digest(name, password, origin(remote).String())
	h, err, _ := a.logins.Do(string(sum[:]), func() (any, error) {
		return a.slowLogin(t, name, password, remote)
	})
	if err != nil {
		return nil, clienttoken.Hash{}, err
	}
	return t, h.(clienttoken.Hash), nil
}

func (a *Authority) slowLogin(t *token, name, password, remote string) (clienttoken.Hash, error) {
	if wait := a.limiter.take(name, remote, time.Now()); wait > 0 {
		return clienttoken.Hash{}, &tooManyError{wait}
	}
	unknown := a.tokens.Load().unknown
	passwords := []clienttoken.Hash{unknown, unknown}
	if t != nil {
		copy(passwords, t.passwords)
	}
	for _, h := range passwords {
		if a.checker.check(h, password) {
			a.limiter.refund(name, remote)
			return h, nil
		}
	}
	if t == nil {
		name = "(unknown)" // it may be a password in the wrong field
	}
	a.log.Warn("login failed", "token", name, "client", remote)
	return clienttoken.Hash{}, errLogin
}

// challenge refuses a request and says where to get a bearer token that would
// do: https://distribution.github.io/distribution/spec/auth/token/.
func (a *Authority) challenge(r *http.Request, needs []Need, code, reason string) *ChallengeError {
	e := &ChallengeError{reason: reason}
	if !a.mayChallenge(r) {
		return e
	}
	scheme := "http"
	// The header is the client's own word, or that of a proxy which ends TLS
	// for it. It is the client that goes where this leads.
	if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" {
		scheme = "https"
	}
	var b strings.Builder
	fmt.Fprintf(&b, `Bearer realm="%s://%s%s",service="%s"`, scheme, headerSafe(r.Host), TokenPath, service)
	if scope := scopeOf(needs); scope != "" {
		fmt.Fprintf(&b, `,scope="%s"`, scope)
	}
	if code != "" {
		fmt.Fprintf(&b, `,error="%s"`, code)
	}
	e.Header = b.String()
	return e
}

// mayChallenge reports whether the credentials that a challenge brings forth
// are meant for this registry.
func (a *Authority) mayChallenge(r *http.Request) bool {
	return a.foreign(r) == ""
}

// foreign is the registry on whose behalf containerd makes a request; empty when
// that is this one.
func (a *Authority) foreign(r *http.Request) string {
	if r.URL.RawQuery == "" {
		return ""
	}
	ns := r.URL.Query().Get("ns")
	if ns == r.Host || a.cfg.Hosts != nil && slices.Contains(a.cfg.Hosts(), ns) {
		return ""
	}
	return ns
}

// mirrored reports whether a request may be answered without credentials because
// of the registry that it is made on behalf of.
func (a *Authority) mirrored(r *http.Request, needs []Need) bool {
	if a.cfg.AnonymousPullFor == nil || len(needs) == 0 {
		return false
	}
	registry := a.foreign(r)
	return registry != "" && !slices.ContainsFunc(needs, func(need Need) bool {
		return !slices.Contains(need.AnyOf, v1alpha1.ActionContentRead) || !a.cfg.AnonymousPullFor(registry, need.Repository)
	})
}

// scopeOf writes needs as clients ask for them, in the words that every client
// knows.
func scopeOf(needs []Need) string {
	var scopes []string
	for _, need := range needs {
		if need.Repository == "" {
			scopes = append(scopes, "registry:catalog:*")
			continue
		}
		words := "pull"
		if !slices.ContainsFunc(need.AnyOf, isRead) {
			words = "pull,push"
		}
		if slices.Contains(need.AnyOf, v1alpha1.ActionContentDelete) {
			words = "delete"
		}
		scopes = append(scopes, "repository:"+need.Repository+":"+words)
	}
	return strings.Join(scopes, " ")
}

// headerSafe keeps a Host header from breaking out of the quotes it is put in.
func headerSafe(host string) string {
	if strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }) {
		return "invalid"
	}
	return host
}
