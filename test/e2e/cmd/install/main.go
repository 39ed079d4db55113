// Command install gives a person a cluster with the product on it: it installs
// the product on the cluster that `cluster up` left running, pushes an image,
// and says what to do next.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/connected-registry/connected-registry/test/cluster"
	"github.com/connected-registry/connected-registry/test/e2e"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "install:", err)
		os.Exit(1)
	}
}

const (
	user     = "dev"
	password = "dev-password"
)

// The registry takes pushes and has no parent: a machine without any network
// can try it.
const values = `
cert-manager: {enabled: false, install: false}
mode: ReadWrite
service: {clusterIP: %s}
clientTokens:
- name: ` + user + `
  secretRef: {name: ` + user + `}
  scopeMap:
  - repositories: ["**"]
    actions: [content/read, content/write, content/delete, metadata/read, metadata/write]
`

const objects = `
apiVersion: v1
kind: Namespace
metadata: {name: ` + e2e.Namespace + `}
---
apiVersion: v1
kind: Secret
metadata: {name: ` + user + `, namespace: ` + e2e.Namespace + `}
stringData: {password1: ` + password + `}
`

func run(ctx context.Context, args []string, stderr io.Writer) error {
	flags := flag.NewFlagSet("install", flag.ContinueOnError)
	flags.SetOutput(stderr)
	config := cluster.Config{Name: "dev", Log: slog.New(slog.NewTextHandler(stderr, nil))}
	flags.StringVar(&config.Name, "name", config.Name, "name of the cluster")
	flags.StringVar(&config.Dir, "dir", "", "directory for programs and clusters (default: in the user's cache directory)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	c, err := cluster.Open(ctx, config)
	if err != nil {
		return err
	}
	config.Log.Info("building the product")
	product, err := e2e.Load(ctx, c)
	if err != nil {
		return err
	}
	if err := c.Apply(ctx, strings.NewReader(objects)); err != nil {
		return err
	}
	config.Log.Info("installing the product")
	host := c.ServiceAddr(50).String()
	if err := product.Install(ctx, fmt.Sprintf(values, host)); err != nil {
		return err
	}
	if err := push(ctx, c, host); err != nil {
		return fmt.Errorf("pushing an image: %w", err)
	}
	fmt.Fprintf(stderr, `
The registry is %[1]s, and holds %[1]s/hello-world:latest. To run it on a node:

  kubectl create secret docker-registry regcred --docker-server=%[1]s --docker-username=%[2]s --docker-password=%[3]s
  kubectl run hello --image=%[1]s/hello-world:latest --restart=Never --overrides='{"spec": {"imagePullSecrets": [{"name": "regcred"}]}}' -- -c 'echo hello from $HOSTNAME'
  kubectl logs hello

`, host, user, password)
	return nil
}

// push pushes an image from the host, which reaches services.
func push(ctx context.Context, c *cluster.Cluster, host string) error {
	encoded, err := c.Kubectl(ctx, "get", "secret", "connected-registry-ca", "-n", e2e.Namespace, "-o", `jsonpath={.data.ca\.crt}`)
	if err != nil {
		return err
	}
	ca, err := base64.StdEncoding.DecodeString(string(encoded))
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return errors.New("secret connected-registry-ca holds no certificate")
	}
	image, err := cluster.Busybox()
	if err != nil {
		return err
	}
	ref, err := name.NewTag(host + "/hello-world:latest")
	if err != nil {
		return err
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	defer transport.CloseIdleConnections()
	return remote.Write(ref, image, remote.WithContext(ctx), remote.WithTransport(transport),
		remote.WithAuth(&authn.Basic{Username: user, Password: password}))
}
