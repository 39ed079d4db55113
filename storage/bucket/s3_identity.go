package bucket

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/credentials/endpointcreds"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

// errNoIdentity is wrapped by the error of an identity that cannot be had.
var errNoIdentity = errors.New("no identity")

// identityPatience bounds a request for credentials.
const identityPatience = 5 * time.Second

// nearby asks what is on this machine or beside it, past any proxy.
func nearby() *http.Client {
	return &http.Client{Timeout: identityPatience, Transport: &http.Transport{DisableKeepAlives: true}}
}

// s3Clients makes clients that know whom to be, and in which region.
func s3Clients(ctx context.Context, c Config, t transport, o s3.Options) (*reloading[*s3.Client], error) {
	metadata := imds.New(imds.Options{HTTPClient: nearby(), Retryer: aws.NopRetryer{}})
	var err error
	if o.Region, err = s3Region(ctx, c.S3, metadata); err != nil {
		return nil, err
	}
	clients := &reloading[*s3.Client]{dir: c.Credentials}
	if c.Credentials == "" {
		o.Credentials = aws.NewCredentialsCache(named{s3Ambient(o.Region, t, metadata)}, func(o *aws.CredentialsCacheOptions) {
			o.ExpiryWindow = 2 * time.Minute
		})
		clients.make = func(map[string]string) (*s3.Client, error) { return s3.New(o), nil }
	} else {
		clients.names = []string{"accessKeyID", "secretAccessKey", "sessionToken"}
		clients.make = func(files map[string]string) (*s3.Client, error) {
			keys, err := s3Keys(files)
			o.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return keys, nil })
			return s3.New(o), err
		}
	}
	_, err = clients.get()
	return clients, err
}

func s3Region(ctx context.Context, c *S3, metadata *imds.Client) (string, error) {
	for _, region := range []string{c.Region, os.Getenv("AWS_REGION"), os.Getenv("AWS_DEFAULT_REGION")} {
		if region != "" {
			return region, nil
		}
	}
	if c.Endpoint != "" {
		return "us-east-1", nil // any will do
	}
	ctx, cancel := context.WithTimeout(ctx, identityPatience)
	defer cancel()
	out, err := metadata.GetRegion(ctx, nil)
	if err != nil {
		return "", errors.New("s3.region: is empty, and neither AWS_REGION nor the machine's metadata name a region: set it to the bucket's")
	}
	return out.Region, nil
}

func s3Keys(files map[string]string) (aws.Credentials, error) {
	keys := aws.Credentials{AccessKeyID: files["accessKeyID"], SecretAccessKey: files["secretAccessKey"], SessionToken: files["sessionToken"]}
	if !keys.HasKeys() {
		return aws.Credentials{}, errors.New("accessKeyID or secretAccessKey is missing or empty: put both there, a file for each")
	}
	return keys, nil
}

// s3Ambient is the identity that the environment provides, looked for in the
// order of Amazon's own clients.
func s3Ambient(region string, t transport, metadata *imds.Client) aws.CredentialsProvider {
	env := os.Getenv
	if env("AWS_ACCESS_KEY_ID") != "" {
		return aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: env("AWS_ACCESS_KEY_ID"), SecretAccessKey: env("AWS_SECRET_ACCESS_KEY"), SessionToken: env("AWS_SESSION_TOKEN")}, nil
		})
	}
	if token := env("AWS_WEB_IDENTITY_TOKEN_FILE"); token != "" {
		api := sts.New(sts.Options{Region: region, HTTPClient: &http.Client{Transport: t}, Retryer: aws.NopRetryer{}, BaseEndpoint: optional(env("AWS_ENDPOINT_URL_STS"))})
		return stscreds.NewWebIdentityRoleProvider(api, env("AWS_ROLE_ARN"), stscreds.IdentityTokenFile(token), func(o *stscreds.WebIdentityRoleOptions) {
			o.RoleSessionName = env("AWS_ROLE_SESSION_NAME")
		})
	}
	endpoint := env("AWS_CONTAINER_CREDENTIALS_FULL_URI")
	if relative := env("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"); relative != "" {
		endpoint = "http://169.254.170.2" + relative
	}
	if endpoint != "" {
		return endpointcreds.New(endpoint, func(o *endpointcreds.Options) {
			o.HTTPClient = nearby()
			o.AuthorizationToken = env("AWS_CONTAINER_AUTHORIZATION_TOKEN")
			if file := env("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"); file != "" {
				o.AuthorizationTokenProvider = endpointcreds.TokenProviderFunc(func() (string, error) {
					token, err := os.ReadFile(file)
					return strings.TrimSpace(string(token)), err
				})
			}
		})
	}
	return ec2rolecreds.New(func(o *ec2rolecreds.Options) { o.Client = metadata })
}

// named marks the errors of a provider.
type named struct{ aws.CredentialsProvider }

func (n named) Retrieve(ctx context.Context) (aws.Credentials, error) {
	keys, err := n.CredentialsProvider.Retrieve(ctx)
	if err != nil {
		return aws.Credentials{}, fmt.Errorf("%w: %w", errNoIdentity, err)
	}
	return keys, nil
}
