package objects

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
)

// StartVersityGW starts a Versity S3 Gateway, which keeps buckets as directories
// of one that has extended attributes. It takes the credentials of a [MinIO].
func StartVersityGW(ctx context.Context, data string, buckets ...string) (*Server, error) {
	program, err := tool("versitygw", "versitygw")
	if err != nil {
		return nil, err
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	if err := makeBuckets(data, buckets); err != nil {
		return nil, err
	}
	s := &Server{URL: "http://" + address}
	s.command = func() *exec.Cmd {
		cmd := exec.Command(program, "--port", address, "--quiet", "--health", "/health", "posix", data)
		cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+AccessKeyID, "ROOT_SECRET_KEY="+SecretAccessKey)
		return cmd
	}
	s.ready = answers(newClient(nil), s.URL+"/health", http.StatusOK)
	if err := s.start(ctx); err != nil {
		return nil, fmt.Errorf("Versity S3 Gateway: %w", err)
	}
	return s, nil
}
