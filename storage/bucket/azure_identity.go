package bucket

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
)

// azureLogin is a container, and whoever we are to it.
type azureLogin struct {
	container *container.Client
}

// newAzureLogin logs in with what lies in files, or as the environment says.
func newAzureLogin(c Config, t transport) *reloading[azureLogin] {
	options := policy.ClientOptions{
		Transport: &http.Client{Transport: t},
		Retry:     policy.RetryOptions{MaxRetries: -1}, // client tries again
		Telemetry: policy.TelemetryOptions{Disabled: true},
	}
	r := &reloading[azureLogin]{dir: c.Credentials}
	if c.Credentials == "" {
		ambient := &azureAmbient{options: options}
		r.make = func(map[string]string) (azureLogin, error) {
			address, err := azureURL(c.Azure, azureParts{})
			if err != nil {
				return azureLogin{}, err
			}
			api, err := container.NewClient(address, ambient, &container.ClientOptions{ClientOptions: options})
			return azureLogin{api}, err
		}
		return r
	}
	r.names = []string{"accountKey", "sasToken", "connectionString"}
	r.make = func(files map[string]string) (azureLogin, error) {
		parts, err := parseAzure(c.Azure, files)
		if err != nil {
			return azureLogin{}, err
		}
		address, err := azureURL(c.Azure, parts)
		if err != nil {
			return azureLogin{}, err
		}
		o := &container.ClientOptions{ClientOptions: options}
		if parts.signature != "" {
			api, err := container.NewClientWithNoCredential(address+"?"+parts.signature, o)
			return azureLogin{api}, err
		}
		key, err := container.NewSharedKeyCredential(parts.account, parts.key)
		if err != nil {
			return azureLogin{}, errors.New("accountKey is not in base64: put one of the account's two access keys there, unchanged")
		}
		api, err := container.NewClientWithSharedKeyCredential(address, key, o)
		return azureLogin{api}, err
	}
	return r
}

// azureParts are what a connection string consists of.
type azureParts struct{ account, key, signature, endpoint string }

func parseAzure(c *Azure, files map[string]string) (azureParts, error) {
	if len(files) != 1 {
		return azureParts{}, fmt.Errorf("%d of accountKey, sasToken and connectionString are there: put exactly one", len(files))
	}
	p := azureParts{account: c.Account, key: files["accountKey"], signature: strings.TrimPrefix(files["sasToken"], "?")}
	if s := files["connectionString"]; s != "" {
		fields := map[string]string{}
		for field := range strings.SplitSeq(s, ";") {
			name, value, _ := strings.Cut(strings.TrimSpace(field), "=")
			fields[strings.ToLower(name)] = value
		}
		p.key, p.signature, p.endpoint = fields["accountkey"], strings.TrimPrefix(fields["sharedaccesssignature"], "?"), fields["blobendpoint"]
		if p.account == "" {
			p.account = fields["accountname"]
		}
		if suffix := fields["endpointsuffix"]; p.endpoint == "" && suffix != "" {
			p.endpoint = "https://" + p.account + ".blob." + suffix
		}
		if p.key == "" && p.signature == "" {
			return azureParts{}, errors.New("connectionString has neither an AccountKey nor a SharedAccessSignature: copy it from the account's access keys, whole")
		}
	}
	if p.key != "" && p.account == "" {
		return azureParts{}, errors.New("an accountKey needs the account's name: set azure.account")
	}
	return p, nil
}

// azureURL is where the container is.
func azureURL(c *Azure, parts azureParts) (string, error) {
	endpoint := c.Endpoint
	if endpoint == "" {
		endpoint = parts.endpoint
	}
	account := c.Account
	if account == "" {
		account = parts.account
	}
	if endpoint == "" && account == "" {
		return "", errors.New("azure.account: is empty: set it to the name of the storage account")
	}
	if endpoint == "" {
		endpoint = "https://" + account + ".blob.core.windows.net"
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" {
		return "", errors.New("BlobEndpoint of connectionString is not a URL: correct it")
	}
	return u.JoinPath(c.Container).String(), nil
}

// azureAmbient is the identity that the environment provides, found when it is
// first wanted.
type azureAmbient struct {
	options policy.ClientOptions

	mu    sync.Mutex
	chain azcore.TokenCredential
}

// GetToken implements [azcore.TokenCredential].
func (a *azureAmbient) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	chain, err := a.get()
	if err != nil {
		return azcore.AccessToken{}, fmt.Errorf("%w: %w", errNoIdentity, err)
	}
	token, err := chain.GetToken(ctx, o)
	if err != nil {
		return azcore.AccessToken{}, fmt.Errorf("%w: %w", errNoIdentity, err)
	}
	return token, nil
}

func (a *azureAmbient) get() (azcore.TokenCredential, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.chain != nil {
		return a.chain, nil
	}
	var sources []azcore.TokenCredential
	if c, err := azidentity.NewEnvironmentCredential(&azidentity.EnvironmentCredentialOptions{ClientOptions: a.options}); err == nil {
		sources = append(sources, c)
	}
	if c, err := azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{ClientOptions: a.options}); err == nil {
		sources = append(sources, c)
	}
	managed := &azidentity.ManagedIdentityCredentialOptions{ClientOptions: a.options}
	if id := os.Getenv("AZURE_CLIENT_ID"); id != "" {
		managed.ID = azidentity.ClientID(id)
	}
	if c, err := azidentity.NewManagedIdentityCredential(managed); err == nil {
		sources = append(sources, c)
	}
	chain, err := azidentity.NewChainedTokenCredential(sources, nil)
	if err != nil {
		return nil, err
	}
	a.chain = chain
	return chain, nil
}
