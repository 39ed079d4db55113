package bucket

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/credentials/endpointcreds"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

// errNoIdentity is wrapped by the error of an identity that cannot be had.
var errNoIdentity = errors.New("no identity")

// identityPatience bounds a request for credentials.
const identityPatience = 5 * time.Second

// s3Identity finds whom to be, and in which region.
func s3Identity(ctx context.Context, c Config, t transport) (aws.CredentialsProvider, string, error) {
	region := c.S3.Region
	for _, name := range []string{"AWS_REGION", "AWS_DEFAULT_REGION"} {
		if region == "" {
			region = os.Getenv(name)
		}
	}
	if region == "" && c.S3.Endpoint != "" {
		region = "us-east-1" // any will do
	}
	metadata := imds.New(imds.Options{HTTPClient: &http.Client{Timeout: identityPatience}, Retryer: aws.NopRetryer{}})
	if region == "" {
		ctx, cancel := context.WithTimeout(ctx, identityPatience)
		defer cancel()
		out, err := metadata.GetRegion(ctx, nil)
		if err != nil {
			return nil, "", errors.New("s3.region: is empty, and neither AWS_REGION nor the machine's metadata name a region: set it to the bucket's")
		}
		region = out.Region
	}
	if c.Credentials != "" {
		files := &reloading[aws.Credentials]{dir: c.Credentials, names: []string{"accessKeyID", "secretAccessKey", "sessionToken"}, make: s3Keys}
		if _, err := files.get(); err != nil {
			return nil, "", err
		}
		return aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return files.get() }), region, nil
	}
	return aws.NewCredentialsCache(named{s3Ambient(region, t, metadata)}, func(o *aws.CredentialsCacheOptions) {
		o.ExpiryWindow = 2 * time.Minute
	}), region, nil
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
			o.HTTPClient = &http.Client{Timeout: identityPatience}
			o.AuthorizationToken = env("AWS_CONTAINER_AUTHORIZATION_TOKEN")
			if file := env("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"); file != "" {
				o.AuthorizationTokenProvider = endpointcreds.TokenProviderFunc(func() (string, error) {
					token, err := os.ReadFile(file)
					return string(token), err
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
