package syncer

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"time"
)

// dockerConfig is what matters here of a docker configuration file.
type dockerConfig struct {
	Auths map[string]struct {
		Auth          string `json:"auth"`
		Username      string `json:"username"`
		Password      string `json:"password"`
		IdentityToken string `json:"identitytoken"`
	} `json:"auths"`
	// CredHelpers are helpers by registry, CredsStore is the one for the rest.
	CredHelpers map[string]string `json:"credHelpers"`
	CredsStore  string            `json:"credsStore"`
}

// dockerCredentials finds a registry in a docker configuration file and gives p
// what stands there. Errors never quote the file.
func dockerCredentials(config []byte, p *Parent, helpers bool) error {
	var file dockerConfig
	if err := json.Unmarshal(config, &file); err != nil {
		return errors.New("not a docker configuration file in JSON")
	}
	if name := file.helper(p.Endpoint); name != "" {
		if !helpers {
			return fmt.Errorf("it names the credential helper %s, and helpers are run in standalone mode alone: put the credentials themselves into the Secret", oneLine(name))
		}
		if !helperName.MatchString(name) {
			return errors.New("its credential helper has a name that cannot be a program's")
		}
		p.Credentials = func(ctx context.Context) (string, string, error) { return askHelper(ctx, name, p.Endpoint) }
		return nil
	}
	for name, entry := range file.Auths {
		if !sameRegistry(name, p.Endpoint) {
			continue
		}
		p.Username, p.Password = entry.Username, entry.Password
		if entry.Auth != "" {
			pair, err := base64.StdEncoding.DecodeString(entry.Auth)
			if err != nil {
				return fmt.Errorf("auths[%q].auth is not base64", name)
			}
			var ok bool
			if p.Username, p.Password, ok = strings.Cut(string(pair), ":"); !ok {
				return fmt.Errorf("auths[%q].auth is not user:password", name)
			}
		}
		if entry.IdentityToken != "" {
			p.Username, p.Password = "", entry.IdentityToken
		}
		return nil
	}
	return fmt.Errorf("auths has no entry for %s", p.Endpoint)
}

// helper is the name of the helper for a registry, "" when there is none: one for
// the registry by name, and the store unless the file itself has credentials.
func (c dockerConfig) helper(host string) string {
	for name, helper := range c.CredHelpers {
		if sameRegistry(name, host) {
			return helper
		}
	}
	for name, entry := range c.Auths {
		if sameRegistry(name, host) && (entry.Auth != "" || entry.Username != "" || entry.IdentityToken != "") {
			return ""
		}
	}
	return c.CredsStore
}

var helperName = regexp.MustCompile(`\A[A-Za-z0-9][A-Za-z0-9._-]*\z`)

// helperTime bounds how long a helper thinks.
const helperTime = 30 * time.Second

// askHelper runs docker-credential-NAME (docker's credential helper protocol,
// "get"): the registry goes in, its credentials come out.
func askHelper(ctx context.Context, name, host string) (username, password string, err error) {
	ctx, cancel := context.WithTimeout(ctx, helperTime)
	defer cancel()
	server := host
	if isDockerHub(host) {
		server = "https://index.docker.io/v1/"
	}
	program := "docker-credential-" + name
	cmd := exec.CommandContext(ctx, program, "get")
	cmd.Stdin = strings.NewReader(server)
	cmd.WaitDelay = time.Second // for what it started and left behind
	var out bytes.Buffer
	cmd.Stdout = &out // what it says is not repeated: it may hold the secret
	if err := cmd.Run(); err != nil {
		return "", "", fmt.Errorf("the credential helper %s has nothing for %s: %w: run it by hand with the argument get", program, server, err)
	}
	var answer struct{ Username, Secret string }
	if json.Unmarshal(out.Bytes(), &answer) != nil || answer.Secret == "" {
		return "", "", fmt.Errorf("the credential helper %s answered for %s with what are no credentials", program, server)
	}
	if answer.Username == "<token>" {
		return "", answer.Secret, nil // an identity token
	}
	return answer.Username, answer.Secret, nil
}

// sameRegistry compares a docker configuration's key, which may be a URL such
// as Docker Hub's https://index.docker.io/v1/, with a registry's host.
func sameRegistry(key, host string) bool {
	if _, rest, ok := strings.Cut(key, "://"); ok {
		key = rest
	}
	key, _, _ = strings.Cut(key, "/")
	return key == host || isDockerHub(key) && isDockerHub(host)
}
