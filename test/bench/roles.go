package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime/pprof"
	"syscall"

	"github.com/connected-registry/connected-registry/registry"
	"github.com/connected-registry/connected-registry/registry/auth"
	"github.com/connected-registry/connected-registry/registry/cache"
	"github.com/connected-registry/connected-registry/storage"
)

// A role is a server that this program becomes when it starts itself anew.
const (
	roleRegistry = "serve-registry" // STORE: the registry in plain HTTP, open to read for everybody
	roleCache    = "serve-cache"    // DIR URL CAFILE: the node cache before a registry
	roleParent   = "serve-parent"   // STORE OPTIONS: a registry that counts, over a link that may be bad
	roleSync     = "sync"           // OPTIONS: the sync engine
	rolePull     = "pull"           // HOSTS STORE IMAGE: a client that pulls once it is told to
)

// profileVariable names the directory that a role writes its CPU profile to.
const profileVariable = "BENCH_PROFILE"

// serveRole is the program in one of its roles. It prints the address that it
// serves on.
func serveRole(role string, args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if dir := os.Getenv(profileVariable); dir != "" {
		f, err := os.CreateTemp(dir, role+"-*.pprof")
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	switch role {
	case roleSync:
		return serveSync(ctx, args[0])
	case rolePull:
		return servePull(ctx, args[0], args[1], args[2])
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	if role == roleParent {
		return serveParent(ctx, l, args[0], args[1])
	}
	if role == roleRegistry {
		return serveRegistry(ctx, l, args[0])
	}
	return serveCache(ctx, l, args[0], args[1], args[2])
}

func serveRegistry(ctx context.Context, l net.Listener, root string) error {
	store, err := storage.Open(ctx, storage.Config{Root: root})
	if err != nil {
		return err
	}
	defer store.Close()
	authority, err := auth.New(auth.Config{
		AnonymousPull: func() bool { return true },
		Hosts:         func() []string { return []string{l.Addr().String()} },
	})
	if err != nil {
		return err
	}
	server, err := registry.New(registry.Config{Store: store, Listener: l, Auth: authority})
	if err != nil {
		return err
	}
	return server.Run(ctx)
}

func serveCache(ctx context.Context, l net.Listener, dir, url, caFile string) error {
	cache.TuneMemory() // as the agent does
	c, err := cache.New(cache.Config{
		Dir:        dir,
		Registries: map[string]cache.Registry{cachedHost: {Upstreams: []cache.Upstream{{URL: url, CAFile: caFile}}}},
		Listener:   l,
	})
	if err != nil {
		return err
	}
	return c.Run(ctx)
}
