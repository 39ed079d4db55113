// Command minio runs a MinIO for whoever tries something out.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/connected-registry/connected-registry/test/objects"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("minio", flag.ContinueOnError)
	address := flags.String("addr", "", "`HOST:PORT` to listen at; a free port when empty")
	data := flags.String("data", "", "`directory` to keep the data in; a temporary one, removed at the end, when empty")
	buckets := flags.String("buckets", "images", "`names` of the buckets, with commas between")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *data == "" {
		dir, err := os.MkdirTemp("", "minio-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		*data = dir
	}
	s, err := objects.MinIO{Address: *address, Data: *data, Buckets: strings.Split(*buckets, ",")}.Start(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	fmt.Fprintf(out, "endpoint: %s\naccessKeyID: %s\nsecretAccessKey: %s\n", s.URL, objects.AccessKeyID, objects.SecretAccessKey)
	<-ctx.Done()
	return nil
}
