package cache

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// The cache stands before the token services of its registries (distribution,
// "Token Authentication Specification"): challenges lead clients to tokenPath
// here, and what they send is passed on. Without that, a client would have to
// trust the registry's authority for what it takes to be a plain HTTP server.
//
// Tokens last for minutes, credentials for long. So it is the credential behind
// a token that permissions are remembered for, as a keyed hash. While the
// registry is unreachable, a credential that its token service has accepted
// gets a token of the cache's own, which is good here alone: it opens what that
// credential was allowed to read before, for as long as Config.OfflineTTL says.
const tokenPath = "/connected-registry/token"

const (
	maxTokenForm   = 64 << 10
	maxTokenAnswer = 1 << 20

	// ownTokenLife is how long the cache's own tokens last.
	ownTokenLife = 5 * time.Minute

	// tokenLife is that of tokens which do not tell (specification: 60 seconds).
	tokenLife = time.Minute

	// maxTokens bounds the tokens remembered to about 1 MiB.
	maxTokens = 4096
)

// tokenService is where a registry's tokens come from.
type tokenService struct {
	realm    *url.URL
	upstream *upstream // by whose authorities it is known
}

// bearer is the credential behind a token.
type bearer struct {
	credential factKey
	own        bool // issued here, and of no use elsewhere
	until      time.Time
}

// bearers remembers the tokens that came by, by their hash.
type bearers struct {
	mu     sync.Mutex // guards tokens
	tokens map[factKey]bearer
}

func (b *bearers) put(token factKey, of bearer) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.tokens) >= maxTokens {
		for k, old := range b.tokens {
			if now.After(old.until) || len(b.tokens) >= maxTokens {
				delete(b.tokens, k)
			}
		}
	}
	if b.tokens == nil {
		b.tokens = make(map[factKey]bearer)
	}
	b.tokens[token] = of
}

func (b *bearers) get(token factKey) (bearer, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	of, ok := b.tokens[token]
	return of, ok && time.Now().Before(of.until)
}

// setAuth gives rq the client's Authorization.
func (rq *request) setAuth(auth string) {
	if auth == "" {
		return
	}
	key := rq.disk.key
	rq.auth = auth
	rq.reader = key.reader(rq.host, rq.repo, auth)
	token, ok := bearerToken(auth)
	if !ok {
		return
	}
	rq.token = key.fact("token", rq.host, token)
	of, known := rq.disk.bearers.get(rq.token)
	rq.stranger = !known
	if known {
		rq.bearer = of
		rq.reader = key.fact("reader of credential", rq.host, rq.repo, string(of.credential[:]))
		if rq.own = of.own; rq.own {
			rq.auth = ""
		}
	}
}

func bearerToken(auth string) (string, bool) {
	scheme, token, _ := strings.Cut(auth, " ")
	return token, strings.EqualFold(scheme, "Bearer") && token != ""
}

// leadHere makes the Bearer challenges of a refusal name the cache, which
// clients reach at host, as the token service.
func (reg *registry) leadHere(no *refusal, host string) {
	for i, challenge := range no.challenges {
		scheme, text, _ := strings.Cut(challenge, " ")
		if !strings.EqualFold(scheme, "Bearer") {
			continue
		}
		params := challengeParams(text)
		up := no.from
		if up == nil {
			up = reg.upstreams[0][len(reg.upstreams[0])-1]
		}
		realm, err := url.Parse(params["realm"])
		if err != nil || realm.Host == "" || realm.Scheme != "https" && realm.Scheme != up.base.Scheme {
			continue // the client may know better
		}
		reg.tokens.Store(&tokenService{realm, up})
		here := url.URL{Scheme: "http", Host: host, Path: tokenPath, RawQuery: url.Values{"ns": {reg.host}}.Encode()}
		rewritten := fmt.Sprintf("Bearer realm=%q", here.String())
		for _, name := range []string{"service", "scope", "error"} {
			if value, ok := params[name]; ok && !strings.ContainsAny(value, "\"\\\r\n") {
				rewritten += fmt.Sprintf(`,%s="%s"`, name, value)
			}
		}
		no.challenges[i] = rewritten
	}
}

// tokenRequest is what a client sends to a token service: GET with Basic
// credentials or none, or POST of a form (specification, and OAuth 2.0).
type tokenRequest struct {
	query      url.Values
	auth       string
	form       []byte // nil: GET
	credential factKey
}

func readTokenRequest(w http.ResponseWriter, r *http.Request, host string, key *nodeKey) (*tokenRequest, error) {
	q := &tokenRequest{query: r.URL.Query(), auth: r.Header.Get("Authorization")}
	q.query.Del("ns")
	user, password, basic := r.BasicAuth()
	switch {
	case r.Method == http.MethodPost:
		form, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxTokenForm))
		media, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
		values, bad := url.ParseQuery(string(form))
		if err != nil || bad != nil || media != "application/x-www-form-urlencoded" {
			return nil, refuse(http.StatusBadRequest, "token", "the request for a token is no form")
		}
		q.form = form
		if refresh := values.Get("refresh_token"); refresh != "" {
			q.credential = key.fact("credential", host, "refresh token", refresh)
			return q, nil
		}
		user, password = values.Get("username"), values.Get("password")
	case r.Method != http.MethodGet:
		return nil, refuse(http.StatusMethodNotAllowed, "token", "tokens are asked for by GET and POST")
	case q.auth != "" && !basic:
		return nil, refuse(http.StatusBadRequest, "token", "the credentials are not of the Basic scheme")
	}
	q.credential = key.fact("credential", host, "password", user, password)
	return q, nil
}

// serveToken passes a request for a token on, or answers it when nobody does.
func (c *Cache) serveToken(w http.ResponseWriter, r *http.Request) error {
	d := c.disk.Load()
	reg, err := c.registryFor(strings.ToLower(r.URL.Query().Get("ns")))
	if err != nil {
		return err
	}
	q, err := readTokenRequest(w, r, reg.host, d.key)
	if err != nil {
		return err
	}
	accepted := d.key.fact("accepted", reg.host, string(q.credential[:]))
	status, body, err := c.forwardToken(r.Context(), reg, q)
	switch {
	case err == nil && status == http.StatusOK:
		if err := d.rememberToken(reg, q.credential, body); err != nil {
			return err
		}
		d.ledger.confirm(accepted)
	case err == nil:
		if status == http.StatusUnauthorized || status == http.StatusForbidden {
			d.ledger.revoke(accepted)
		}
		return refuse(status, "token", "the registry's token service refuses")
	case d.ledger.known(accepted, c.cfg.OfflineTTL):
		if body, err = d.ownToken(reg, q.credential); err != nil {
			return err
		}
	default:
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_, _ = w.Write(body)
	return nil
}

// servers returns whom to ask for a token: where the token service is the
// registry itself, all that stand for it, in the order in which they are asked
// for content.
func (s *tokenService) servers(reg *registry) []*upstream {
	if s.realm.Scheme != s.upstream.base.Scheme || hostPort(s.realm) != hostPort(s.upstream.base) {
		return []*upstream{s.upstream}
	}
	for _, group := range reg.upstreams {
		if slices.Contains(group, s.upstream) {
			return group.choose()
		}
	}
	return []*upstream{s.upstream} // of a configuration that has been replaced since
}

// tokenAnswer is what a token service says about a credential.
type tokenAnswer struct {
	status int
	body   []byte
	err    error // unavailable: it says nothing
}

// forwardToken returns the answer of the token service, if it is one that says
// something about the credential. Who does not answer is not waited for: the
// next one is asked as well.
func (c *Cache) forwardToken(ctx context.Context, reg *registry, q *tokenRequest) (int, []byte, error) {
	service := reg.tokens.Load()
	if service == nil {
		return 0, nil, &unavailable{"token", errors.New("the registry has not named its token service yet")}
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Timeouts.Headers)
	defer cancel()
	order := service.servers(reg)
	answers := make(chan tokenAnswer, len(order))
	pace := c.cfg.Timeouts.Headers / time.Duration(len(order)+1)
	var last error
	for asked, failed := 0, 0; failed < len(order); {
		var next <-chan time.Time
		if asked < len(order) {
			up := order[asked]
			c.asker.work.Go(func() { answers <- c.askToken(ctx, up, service.realm, q, false) })
			asked++
			next = time.After(pace)
		}
		select {
		case a := <-answers:
			if a.err == nil {
				return a.status, a.body, nil
			}
			failed++
			last = a.err
		case <-next:
		}
	}
	return 0, nil, last
}

// askToken asks one server, unless it is silent. One that does not answer in
// time is alive, perhaps: wrong passwords take long to refuse.
func (c *Cache) askToken(ctx context.Context, up *upstream, realm *url.URL, q *tokenRequest, again bool) tokenAnswer {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done, ok := up.silences.wait(question{who: q.credential, again: again}, cancel)
	if !ok {
		up.silences.want(question{who: q.credential}, nil)
		return tokenAnswer{err: &unavailable{"timeout", fmt.Errorf("%s %w", up.name, errDown)}}
	}
	defer done()
	resp, err := up.transport.RoundTrip(q.to(ctx, realm)) // credentials are not redirected
	if err != nil {
		down := transportError(ctx, up, err)
		if again || errors.Is(down, context.Canceled) || errors.Is(down, errDown) {
			return tokenAnswer{err: down}
		}
		up.health.failed(time.Now().Add(c.cfg.Timeouts.Retry))
		if down.cause == "timeout" {
			c.asker.fellSilent(up, matter{who: q.credential}, func(ctx context.Context) bool {
				return !timedOut(c.askToken(ctx, up, realm, q, true).err)
			})
		}
		return tokenAnswer{err: down}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenAnswer))
	if err != nil {
		return tokenAnswer{err: transportError(ctx, up, err)}
	}
	switch resp.StatusCode {
	case http.StatusOK, http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden,
		http.StatusNotFound, http.StatusMethodNotAllowed:
		return tokenAnswer{status: resp.StatusCode, body: body}
	default:
		return tokenAnswer{err: &unavailable{"token", fmt.Errorf("the token service %s answered %d", up.name, resp.StatusCode)}}
	}
}

// to makes the request for a token service.
func (q *tokenRequest) to(ctx context.Context, realm *url.URL) *http.Request {
	u := *realm
	query := u.Query()
	for name, values := range q.query {
		query[name] = values
	}
	u.RawQuery = query.Encode()
	r := &http.Request{Method: http.MethodGet, URL: &u, Host: u.Host, Header: http.Header{}, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}
	if q.form != nil {
		r.Method, r.Body, r.ContentLength = http.MethodPost, io.NopCloser(bytes.NewReader(q.form)), int64(len(q.form))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if q.auth != "" {
		r.Header.Set("Authorization", q.auth)
	}
	return r.WithContext(ctx)
}

func (d *disk) rememberToken(reg *registry, credential factKey, body []byte) error {
	var answer struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   int64  `json:"expires_in"` // seconds
	}
	if err := json.Unmarshal(body, &answer); err != nil || answer.Token == "" && answer.AccessToken == "" {
		return &unavailable{"token", errors.New("the registry's token service answered without a token")}
	}
	life := tokenLife
	if answer.ExpiresIn > 0 {
		life = min(time.Duration(answer.ExpiresIn)*time.Second, 24*time.Hour)
	}
	for _, token := range []string{answer.Token, answer.AccessToken} {
		if token != "" {
			d.bearers.put(d.key.fact("token", reg.host, token), bearer{credential: credential, until: time.Now().Add(life)})
		}
	}
	return nil
}

func (d *disk) ownToken(reg *registry, credential factKey) ([]byte, error) {
	token := "offline-" + rand.Text()
	now := time.Now()
	d.bearers.put(d.key.fact("token", reg.host, token), bearer{credential: credential, own: true, until: now.Add(ownTokenLife)})
	return json.Marshal(map[string]any{
		"token": token, "access_token": token, "expires_in": int(ownTokenLife / time.Second),
		"issued_at": now.UTC().Format(time.RFC3339),
	})
}
