package node

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// answerTime bounds one question to a runtime that runs.
const answerTime = 5 * time.Second

// Runtime speaks to a container runtime by its CRI socket.
type Runtime struct {
	conn *grpc.ClientConn
	path string
}

// Connect returns the runtime behind a socket; nothing is dialled before the
// first question. Close it.
func Connect(socket string) (*Runtime, error) {
	conn, err := grpc.NewClient("passthrough:///unix:"+socket,
		grpc.WithContextDialer(dialUnix(socket)), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, MaxDelay: time.Second}}))
	if err != nil {
		return nil, fmt.Errorf("runtime socket %s: %w", socket, err)
	}
	return &Runtime{conn: conn, path: socket}, nil
}

// Close ends the connection.
func (r *Runtime) Close() { _ = r.conn.Close() }

// Version asks the runtime for its name and version.
func (r *Runtime) Version(ctx context.Context) (name string, v Version, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	answer, err := cri.NewRuntimeServiceClient(r.conn).Version(ctx, &cri.VersionRequest{})
	if err != nil {
		return "", Version{}, fmt.Errorf("asking the runtime at %s for its version: %w", r.path, err)
	}
	return answer.RuntimeName, parseVersion(answer.RuntimeVersion), nil
}

// Answers reports whether the runtime's image service is up, waiting for it
// until ctx ends.
func (r *Runtime) Answers(ctx context.Context) error {
	for {
		err := r.listImages(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the runtime at %s does not answer: %w", r.path, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (r *Runtime) listImages(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	none := &cri.ImageFilter{Image: &cri.ImageSpec{Image: "connected-registry.invalid/none"}}
	_, err := cri.NewImageServiceClient(r.conn).ListImages(ctx, &cri.ListImagesRequest{Filter: none})
	return err
}

// Pull has the runtime pull an image, as the kubelet would.
func (r *Runtime) Pull(ctx context.Context, image string) error {
	_, err := cri.NewImageServiceClient(r.conn).PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: image}})
	if err != nil {
		return fmt.Errorf("pulling %s: %w", image, err)
	}
	return nil
}
