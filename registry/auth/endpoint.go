package auth

import (
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// TokenPath and TokenPathShort are where ServeToken belongs.
const (
	TokenPath      = "/oauth2/token"
	TokenPathShort = "/token"
)

const (
	maxForm   = 64 << 10
	maxScopes = 64 // repositories in one bearer token
)

// ServeToken issues bearer tokens: for GET with Basic credentials, or none, as
// docker asks for them, and for POST of a form with grant_type=password, as
// containerd does.
func (a *Authority) ServeToken(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	req, err := tokenRequest(w, r)
	if err != nil {
		refuseToken(w, http.StatusBadRequest, "UNSUPPORTED", err.Error())
		return
	}
	c := claims{Issuer: service}
	id := Identity{anonymous: a.cfg.AnonymousPull()}
	if req.login {
		t, h, err := a.login(req.name, req.password, r.RemoteAddr)
		var tooMany *tooManyError
		if errors.As(err, &tooMany) {
			w.Header().Set("Retry-After", strconv.Itoa(tooMany.seconds()))
			refuseToken(w, http.StatusTooManyRequests, "TOOMANYREQUESTS", err.Error())
			return
		}
		if err != nil {
			refuseToken(w, http.StatusUnauthorized, "UNAUTHORIZED", err.Error())
			return
		}
		id.token, c.Subject, c.Key = t, t.name, passwordID(h)
	} else if !id.anonymous {
		w.Header().Set("WWW-Authenticate", `Basic realm="`+service+`"`)
		refuseToken(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
		return
	}
	now := time.Now()
	c.Issued, c.Expires = now.Unix(), now.Add(BearerLifetime).Unix()
	c.Access = id.grants(req.scopes)
	a.issue(w, c, now)
}

func (a *Authority) issue(w http.ResponseWriter, c claims, now time.Time) {
	text, err := a.signer.sign(c)
	if err != nil {
		refuseToken(w, http.StatusInternalServerError, "UNKNOWN", "the token could not be made")
		a.log.Error("bearer token could not be made", "error", err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   int    `json:"expires_in"` // seconds
		IssuedAt    string `json:"issued_at"`
	}{text, text, int(BearerLifetime.Seconds()), now.UTC().Format(time.RFC3339)})
}

// grants is what a client gets of the scopes that it asks for: what it may have.
func (id Identity) grants(scopes []string) []grant {
	var grants []grant
	for _, text := range scopes {
		g, ok := parseResource(text)
		if !ok || len(grants) == maxScopes {
			continue
		}
		if g.Type == "repository" {
			g.Actions = slices.DeleteFunc(g.Actions, func(a v1alpha1.Action) bool { return !id.allows(g.Name, a) })
		}
		if len(g.Actions) > 0 {
			grants = append(grants, g)
		}
	}
	return grants
}

// parseResource reads one scope, "<type>:<name>:<action>[,<action>…]": the
// words of the token specification, or the actions of scope maps with their
// slash or with Azure's underscore.
func parseResource(text string) (grant, bool) {
	kind, rest, _ := strings.Cut(text, ":")
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return grant{}, false
	}
	g := grant{Type: kind, Name: rest[:i]}
	switch {
	case kind == "registry" && g.Name == "catalog":
		g.Actions = []v1alpha1.Action{v1alpha1.ActionMetadataRead}
		return g, true
	case kind != "repository" || g.Name == "":
		return grant{}, false
	}
	for word := range strings.SplitSeq(rest[i+1:], ",") {
		for _, a := range actionsFor(word) {
			if !slices.Contains(g.Actions, a) {
				g.Actions = append(g.Actions, a)
			}
		}
	}
	return g, true
}

// actionsFor is what a word in a scope stands for.
func actionsFor(word string) []v1alpha1.Action {
	switch word {
	case "pull":
		return []v1alpha1.Action{v1alpha1.ActionContentRead, v1alpha1.ActionMetadataRead}
	case "push":
		return []v1alpha1.Action{v1alpha1.ActionContentWrite, v1alpha1.ActionMetadataWrite}
	case "delete":
		return []v1alpha1.Action{v1alpha1.ActionContentDelete}
	case "*":
		return allActions
	}
	if a := v1alpha1.Action(strings.ReplaceAll(word, "_", "/")); slices.Contains(allActions, a) {
		return []v1alpha1.Action{a}
	}
	return nil
}

// requested is a request for a bearer token.
type requested struct {
	login          bool // credentials were given
	name, password string
	scopes         []string
}

func tokenRequest(w http.ResponseWriter, r *http.Request) (requested, error) {
	var values url.Values
	var req requested
	switch r.Method {
	case http.MethodGet:
		values = r.URL.Query()
		req.name, req.password, req.login = r.BasicAuth()
		if !req.login && r.Header.Get("Authorization") != "" {
			return req, errors.New("the Authorization header is not Basic")
		}
	case http.MethodPost:
		var err error
		if values, err = postForm(w, r); err != nil {
			return req, err
		}
		if grant := values.Get("grant_type"); grant != "password" {
			return req, errors.New("grant_type must be password")
		}
		req.name, req.password, req.login = values.Get("username"), values.Get("password"), true
	default:
		return req, errors.New("use GET or POST")
	}
	for _, scope := range values["scope"] {
		req.scopes = append(req.scopes, strings.Fields(scope)...)
	}
	return req, nil
}

// postForm reads the form in a body, and nothing from the URL, where a password
// would end up in somebody's log.
func postForm(w http.ResponseWriter, r *http.Request) (url.Values, error) {
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/x-www-form-urlencoded" {
		return nil, errors.New("Content-Type must be application/x-www-form-urlencoded")
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxForm))
	if err != nil {
		return nil, errors.New("the form cannot be read or is larger than 64 KiB")
	}
	values, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, errors.New("the form is malformed") // the error would quote it
	}
	return values, nil
}

// refuseToken answers with an error in the form of the distribution
// specification, which the clients of token servers look for too.
func refuseToken(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	type entry struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	json.NewEncoder(w).Encode(struct {
		Errors []entry `json:"errors"`
	}{[]entry{{code, message}}})
}
