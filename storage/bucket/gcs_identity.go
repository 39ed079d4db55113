package bucket

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/google"
)

// gcsScope is what tokens are good for.
const gcsScope = "https://www.googleapis.com/auth/devstorage.read_write"

// gcsTypes are the credentials that are taken.
var gcsTypes = []google.CredentialsType{google.ServiceAccount, google.ExternalAccount, google.AuthorizedUser, google.ImpersonatedServiceAccount}

// gcsToken gets tokens, and keeps them while they are good.
type gcsToken struct {
	sources *reloading[oauth2.TokenSource]
}

func newGCSToken(c Config, t transport) (*gcsToken, error) {
	// Tokens are got over and over, so this context does not end; the client does.
	base := context.WithValue(context.Background(), oauth2.HTTPClient, &http.Client{Transport: t, Timeout: 2 * identityPatience})
	r := &reloading[oauth2.TokenSource]{dir: c.Credentials}
	if c.Credentials == "" {
		r.make = func(map[string]string) (oauth2.TokenSource, error) { return &gcsAmbient{base: base}, nil }
		return &gcsToken{r}, nil
	}
	r.names = []string{"credentials.json"}
	r.make = func(files map[string]string) (oauth2.TokenSource, error) {
		data := []byte(files["credentials.json"])
		var kind struct {
			Type google.CredentialsType `json:"type"`
		}
		if err := json.Unmarshal(data, &kind); err != nil || !slices.Contains(gcsTypes, kind.Type) {
			return nil, fmt.Errorf("credentials.json is missing, or is not of a %s, %s, %s or %s: put the JSON file there that Google made", gcsTypes[0], gcsTypes[1], gcsTypes[2], gcsTypes[3])
		}
		found, err := google.CredentialsFromJSONWithType(base, data, kind.Type, gcsScope)
		if err != nil {
			return nil, errors.New("credentials.json cannot be used: put the JSON file there that Google made, unchanged")
		}
		return found.TokenSource, nil
	}
	_, err := r.get()
	return &gcsToken{r}, err
}

// gcsAmbient is the identity that the environment provides, found when it is
// first wanted.
type gcsAmbient struct {
	base context.Context //nolint:containedctx // of the client that oauth2 uses, which outlives any request

	mu     sync.Mutex
	source oauth2.TokenSource
}

// Token implements [oauth2.TokenSource].
func (a *gcsAmbient) Token() (*oauth2.Token, error) {
	a.mu.Lock()
	if a.source == nil {
		found, err := google.FindDefaultCredentials(a.base, gcsScope)
		if err != nil {
			a.mu.Unlock()
			return nil, err
		}
		a.source = found.TokenSource
	}
	a.mu.Unlock()
	return a.source.Token()
}

// sign puts a token into a request. It waits no longer than the request's
// context, though whoever gets the token may.
func (t *gcsToken) sign(r *http.Request) error {
	source, err := t.sources.get()
	if err != nil {
		return fmt.Errorf("%w: %w", errNoIdentity, err)
	}
	type result struct {
		token *oauth2.Token
		err   error
	}
	done := make(chan result, 1)
	go func() {
		token, err := source.Token()
		done <- result{token, err}
	}()
	select {
	case got := <-done:
		if got.err != nil {
			return fmt.Errorf("%w: %w", errNoIdentity, got.err)
		}
		got.token.SetAuthHeader(r)
		return nil
	case <-r.Context().Done():
		return r.Context().Err()
	}
}
