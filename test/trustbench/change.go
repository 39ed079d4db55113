package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	core "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/connected-registry/connected-registry/trust"
)

const (
	// lookInterval is between two looks at the files of all nodes.
	lookInterval = 5 * time.Millisecond
	// calm is between two changes, for everybody to finish.
	calm = 500 * time.Millisecond
	// patience is when a change is given up.
	patience = 3 * time.Minute
)

// change gives the Secret a new CA, and returns how long each of the files took
// to hold it.
func change(ctx context.Context, kube kubernetes.Interface, namespace, secret string, files []string) ([]time.Duration, error) {
	authority, err := trust.NewAuthority(time.Now())
	if err != nil {
		return nil, err
	}
	want := bytes.TrimSpace(authority.Bundle().PEM())
	data := map[string][]byte{"ca.crt": want}
	began := time.Now()
	object := core.Secret(secret, namespace).WithType(corev1.SecretTypeOpaque).WithData(data)
	if _, err := kube.CoreV1().Secrets(namespace).Apply(ctx, object, metav1.ApplyOptions{FieldManager: "trustbench", Force: true}); err != nil {
		return nil, err
	}
	return watchFiles(ctx, files, want, began)
}

// watchFiles looks at files until all of them hold want.
func watchFiles(ctx context.Context, files []string, want []byte, began time.Time) ([]time.Duration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("gave up"))
	defer cancel()
	took := make([]time.Duration, 0, len(files))
	left := make(map[string]fs.FileInfo, len(files))
	for _, f := range files {
		left[f] = nil
	}
	for len(left) > 0 {
		for file, last := range left {
			info, err := os.Stat(file)
			if err != nil || last != nil && os.SameFile(info, last) && info.ModTime().Equal(last.ModTime()) {
				continue // not there yet, or as before
			}
			left[file] = info
			if data, err := os.ReadFile(file); err == nil && bytes.Contains(data, want) {
				took = append(took, time.Since(began))
				delete(left, file)
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%d of %d nodes do not trust what the Secret holds: %w", len(left), len(files), context.Cause(ctx))
		case <-time.After(lookInterval):
		}
	}
	return took, nil
}

// measure changes the Secret so many times.
func measure(ctx context.Context, kube kubernetes.Interface, namespace, secret string, files []string, times int) ([]time.Duration, error) {
	var all []time.Duration
	for range times {
		took, err := change(ctx, kube, namespace, secret, files)
		if err != nil {
			return nil, err
		}
		all = append(all, took...)
		time.Sleep(calm)
	}
	return all, nil
}

func dialer() func(ctx context.Context, network, address string) (net.Conn, error) {
	return (&net.Dialer{Timeout: patience, KeepAlive: 30 * time.Second}).DialContext
}
