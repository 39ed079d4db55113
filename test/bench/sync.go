package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/storage"
)

// What is synchronised.
const (
	syncRepositories = 10
	syncImages       = 20       // of each repository
	syncCommon       = 25 << 20 // each of 8 layers that all repositories share
	syncShared       = 16 << 20 // each of 4 layers that a repository's images share
	syncOwn          = 3 << 20  // each of 2 layers of one image
	syncTags         = 5000     // of the second case, over 50 repositories
	badBytes         = 512 << 20
	slowBytes        = 40 << 20
	syncKills        = 10
)

// syncContent is what a parent has.
type syncContent struct {
	repositories []string
	unique       int64 // bytes of blobs
}

func (b *benchmark) syncCases() []benchCase {
	return []benchCase{
		{"sync: first copy, 200 images", b.firstCopy},
		{"sync: 5,000 unchanged tags", b.unchangedTags},
		{"sync: link resets every 5 MB", func() ([]line, error) { return b.badLink(badBytes, parentOptions{ResetAfter: 5e6}) }},
		{"sync: link of 2 MB/s", func() ([]line, error) { return b.badLink(slowBytes, parentOptions{PerSecond: 2e6}) }},
		{"sync: ten layers of 1 GiB at once", b.largeLayers},
	}
}

// startParent starts a parent of its own for a case.
func (b *benchmark) startParent(root string, o parentOptions) (*process, error) {
	options := fmt.Sprintf(`{"ResetAfter":%d,"PerSecond":%d}`, o.ResetAfter, o.PerSecond)
	return start("", filepath.Join(b.dir, "parent.log"), b.self, roleParent, root, options)
}

// syncDir is a directory for one case, which remove takes away: the cases write
// much.
func (b *benchmark) syncDir(name string) (dir string, remove func(), err error) {
	dir, err = os.MkdirTemp(b.dir, name+"-")
	return dir, func() { os.RemoveAll(dir) }, err
}

// firstCopy copies everything into an empty registry. The others need a registry
// to copy to, distribution's; ours is one.
func (b *benchmark) firstCopy() ([]line, error) {
	dir, remove, err := b.syncDir("first")
	if err != nil {
		return nil, err
	}
	defer remove()
	root := filepath.Join(dir, "parent")
	content, err := seedImages(root)
	if err != nil {
		return nil, err
	}
	parent, err := b.startParent(root, parentOptions{})
	if err != nil {
		return nil, err
	}
	defer parent.stop()
	var ours, best samples
	var fetched, theirs parentCounts
	fastest := ""
	for i := range b.syncRounds() {
		took, err := b.copyOurs(filepath.Join(dir, fmt.Sprint("ours", i)), parent, content)
		if err != nil {
			return nil, err
		}
		ours.ours = append(ours.ours, took)
		if fetched, err = parent.counts(); err != nil {
			return nil, err
		}
		shortest := 0.0
		for _, peer := range b.peers() {
			took, err := b.copyTheirs(filepath.Join(dir, fmt.Sprint(peer.name, i)), peer, parent, content)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", peer.name, err)
			}
			c, err := parent.counts()
			if err != nil {
				return nil, err
			}
			fmt.Printf("  %s: %.1f s, %d MiB of blobs\n", peer.name, took, c.Blobs>>20)
			if shortest == 0 || took < shortest {
				shortest, fastest, theirs = took, peer.name, c
			}
		}
		best.theirs = append(best.theirs, shortest)
	}
	mine, other := median(ours.ours), median(best.theirs)
	fmt.Printf("  the fastest of the others is %s\n", fastest)
	return []line{
		{unit: "s", ours: mine, theirs: other, ratio: other / mine, bound: bound{least: 1.5}},
		{unit: "bytes", ours: float64(fetched.Blobs) / float64(content.unique), theirs: float64(theirs.Blobs) / float64(content.unique), ratio: float64(fetched.Blobs) / float64(content.unique), bound: bound{most: 1, least: 1}},
	}, nil
}

// syncRounds is how many turns of the long cases there are.
func (b *benchmark) syncRounds() int { return max(1, (b.rounds+1)/2) }

func (b *benchmark) copyOurs(root string, parent *process, content syncContent) (seconds float64, err error) {
	defer os.RemoveAll(root)
	if err := quiet(); err != nil {
		return 0, err
	}
	begun := time.Now()
	p, err := b.startSync(syncOptions{Root: root, Parent: parent.addr, Repositories: content.repositories})
	if err != nil {
		return 0, err
	}
	defer p.end()
	_, err = p.sync()
	return time.Since(begun).Seconds(), err
}

// quiet has the disk finish what went before, so that it burdens nobody.
func quiet() error { return exec.Command("sync").Run() }

// peer is another program that copies images from registry to registry.
type peer struct {
	name string
	copy func(dir, from, to string, repositories []string) error
}

// peers are the others with their best settings: as many at once as the machine
// gains from.
func (b *benchmark) peers() []peer {
	all := []peer{
		{"regsync", func(dir, from, to string, repositories []string) error {
			return b.regsync(dir, from, to, repositories)
		}},
		{"crane", func(_, from, to string, repositories []string) error {
			return eachOf(repositories, func(name string) error {
				return quietly(exec.Command(filepath.Join(b.dir, "crane"), "copy", "--insecure", "--all-tags", "--jobs", "8", from+"/"+name, to+"/"+name))
			})
		}},
	}
	if skopeo, err := exec.LookPath("skopeo"); err == nil {
		all = append(all, peer{"skopeo", func(_, from, to string, repositories []string) error {
			return eachOf(repositories, func(name string) error {
				return quietly(exec.Command(skopeo, "sync", "--all", "--src", "docker", "--dest", "docker", "--src-tls-verify=false", "--dest-tls-verify=false", from+"/"+name, to+"/"+filepath.Dir(name)))
			})
		}})
	}
	return all
}

// eachOf calls do for four names at a time.
func eachOf(names []string, do func(string) error) error {
	var g errgroup.Group
	g.SetLimit(4)
	for _, name := range names {
		g.Go(func() error { return do(name) })
	}
	return g.Wait()
}

func quietly(cmd *exec.Cmd) error {
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(said[max(0, len(said)-1000):]))
	}
	return nil
}

// regsync writes its configuration and runs it once.
func (b *benchmark) regsync(dir, from, to string, repositories []string) error {
	var config strings.Builder
	config.WriteString("version: 1\ncreds:\n")
	for _, host := range []string{from, to} {
		fmt.Fprintf(&config, "  - registry: %q\n    tls: disabled\n    reqConcurrent: 32\n", host)
	}
	config.WriteString("defaults:\n  parallel: 8\nsync:\n")
	for _, name := range repositories {
		fmt.Fprintf(&config, "  - source: %s/%s\n    target: %s/%s\n    type: repository\n", from, name, to, name)
	}
	file := filepath.Join(dir, "regsync.yaml")
	if err := os.WriteFile(file, []byte(config.String()), 0o600); err != nil {
		return err
	}
	return quietly(exec.Command(filepath.Join(b.dir, "regsync"), "--verbosity", "error", "once", "-c", file))
}

func (b *benchmark) copyTheirs(dir string, p peer, parent *process, content syncContent) (seconds float64, err error) {
	defer os.RemoveAll(dir)
	root := filepath.Join(dir, "store")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return 0, err
	}
	target, err := b.startDistribution(filepath.Join(b.dir, "distribution"), root, "")
	if err != nil {
		return 0, err
	}
	defer b.stopLast()
	if err := quiet(); err != nil {
		return 0, err
	}
	begun := time.Now()
	if err := p.copy(dir, parent.addr, target.addr, content.repositories); err != nil {
		return 0, err
	}
	return time.Since(begun).Seconds(), nil
}

// unchangedTags looks again at what is here already.
func (b *benchmark) unchangedTags() ([]line, error) {
	dir, remove, err := b.syncDir("tags")
	if err != nil {
		return nil, err
	}
	defer remove()
	content, err := seedTags(filepath.Join(dir, "parent"))
	if err != nil {
		return nil, err
	}
	parent, err := b.startParent(filepath.Join(dir, "parent"), parentOptions{})
	if err != nil {
		return nil, err
	}
	defer parent.stop()
	p, err := b.startSync(syncOptions{Root: filepath.Join(dir, "ours"), Parent: parent.addr, Repositories: content.repositories})
	if err != nil {
		return nil, err
	}
	defer p.end()
	if _, err := p.sync(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(dir, "store"), 0o755); err != nil {
		return nil, err
	}
	target, err := b.startDistribution(filepath.Join(b.dir, "distribution"), filepath.Join(dir, "store"), "")
	if err != nil {
		return nil, err
	}
	defer b.stopLast()
	regsync := func() error { return b.regsync(dir, parent.addr, target.addr, content.repositories) }
	if err := regsync(); err != nil {
		return nil, err
	}
	var seconds samples
	var ours, theirs parentCounts
	err = turns(b.syncRounds(), func(mine bool) error {
		if _, err := parent.counts(); err != nil {
			return err
		}
		begun := time.Now()
		counts := &theirs
		if mine {
			counts = &ours
			_, err = p.sync()
		} else {
			err = regsync()
		}
		if err != nil {
			return err
		}
		seconds.add(mine, time.Since(begun).Seconds())
		*counts, err = parent.counts()
		return err
	})
	if err != nil {
		return nil, err
	}
	mine, other := median(seconds.ours), median(seconds.theirs)
	return []line{
		{unit: "s", ours: mine, theirs: other, ratio: other / mine, bound: bound{least: 2}},
		{unit: "req/tag", ours: float64(ours.Manifests) / syncTags, theirs: float64(theirs.Manifests) / syncTags, ratio: float64(ours.Manifests) / syncTags, bound: bound{most: 1}},
		{unit: "all req", ours: float64(ours.Requests), theirs: float64(theirs.Requests)},
		{unit: "bodies", ours: float64(ours.Bodies), theirs: float64(theirs.Bodies), bound: bound{mostOurs: 0.5}},
	}, nil
}

// badLink copies over a bad link, undisturbed and then with the process killed
// again and again.
func (b *benchmark) badLink(size int64, o parentOptions) ([]line, error) {
	dir, remove, err := b.syncDir("link")
	if err != nil {
		return nil, err
	}
	defer remove()
	content, err := seedLayers(filepath.Join(dir, "parent"), size)
	if err != nil {
		return nil, err
	}
	var lines []line
	for _, kills := range []int{0, syncKills} {
		root := filepath.Join(dir, fmt.Sprint("ours", kills))
		twice, seconds, err := b.copyKilled(root, filepath.Join(dir, "parent"), o, content, kills)
		if err != nil {
			return nil, err
		}
		name := "% twice"
		if kills > 0 {
			name = fmt.Sprintf("%%, %d ×", kills)
		}
		lines = append(lines, line{unit: name, ours: 100 * twice, bound: bound{mostOurs: 2}}, line{unit: "s", ours: seconds})
		if err := os.RemoveAll(root); err != nil {
			return nil, err
		}
	}
	return lines, nil
}

// copyKilled says which part of the bytes was sent more than once.
func (b *benchmark) copyKilled(root, parentRoot string, o parentOptions, content syncContent, kills int) (twice, seconds float64, err error) {
	parent, err := b.startParent(parentRoot, o)
	if err != nil {
		return 0, 0, err
	}
	defer parent.stop()
	begun := time.Now()
	options := syncOptions{Root: root, Parent: parent.addr, Repositories: content.repositories}
	var sent int64
	count := func() error {
		c, err := parent.counts()
		sent += c.Blobs
		return err
	}
	for kill := range kills + 1 {
		p, err := b.startSync(options)
		if err != nil {
			return 0, 0, err
		}
		ended := p.begin()
		for next := content.unique * int64(kill+1) / int64(kills+1); kill < kills && sent < next; time.Sleep(20 * time.Millisecond) {
			if err := count(); err != nil {
				p.kill()
				return 0, 0, err
			}
		}
		if kill < kills {
			p.kill()
			<-ended
			continue
		}
		err = <-ended
		p.kill()
		if err != nil {
			return 0, 0, err
		}
	}
	if err := count(); err != nil {
		return 0, 0, err
	}
	return float64(sent-content.unique) / float64(content.unique), time.Since(begun).Seconds(), nil
}

// largeLayers copies ten layers of 1 GiB, all at once.
func (b *benchmark) largeLayers() ([]line, error) {
	dir, remove, err := b.syncDir("large")
	if err != nil {
		return nil, err
	}
	defer remove()
	root := filepath.Join(dir, "parent")
	content, err := seedLarge(root, 10)
	if err != nil {
		return nil, err
	}
	parent, err := b.startParent(root, parentOptions{})
	if err != nil {
		return nil, err
	}
	defer parent.stop()
	p, err := b.startSync(syncOptions{Root: filepath.Join(dir, "ours"), Parent: parent.addr, Repositories: content.repositories, Concurrency: 10})
	if err != nil {
		return nil, err
	}
	defer p.end()
	return p.memory(func() error {
		_, err := p.sync()
		return err
	}, bound{mostOurs: 100})
}

// seedStore fills a store.
func seedStore(root string, fill func(ctx context.Context, s *seeder) error) (syncContent, error) {
	ctx := context.Background()
	store, err := storage.Open(ctx, storage.Config{Root: root})
	if err != nil {
		return syncContent{}, err
	}
	defer store.Close()
	s := &seeder{root: root, store: store, random: rand.NewChaCha8([32]byte{7})}
	if err := fill(ctx, s); err != nil {
		return syncContent{}, err
	}
	return s.content, nil
}

type seeder struct {
	root    string
	store   *storage.Store
	random  *rand.ChaCha8
	content syncContent
}

type seededBlob struct {
	digest digest.Digest
	size   int64
}

// layer writes a layer of random bytes.
func (s *seeder) layer(size int64) (seededBlob, error) {
	f, err := os.CreateTemp(s.root, "layer-")
	if err != nil {
		return seededBlob{}, err
	}
	defer f.Close()
	hash := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(f, hash), s.random, size); err != nil {
		return seededBlob{}, err
	}
	d := digest.NewDigest(digest.SHA256, hash)
	s.content.unique += size
	_, err = place(s.root, f, d)
	return seededBlob{d, size}, err
}

// image stores an image of layers under a tag, with a config of its own.
func (s *seeder) image(ctx context.Context, name, tag string, layers ...seededBlob) error {
	repo, err := s.store.Repository(name)
	if err != nil {
		return err
	}
	config := fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","author":%q,"rootfs":{"type":"layers","diff_ids":[]}}`, name+":"+tag)
	f, err := os.CreateTemp(s.root, "config-")
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(config); err != nil {
		return err
	}
	blob := seededBlob{digest.FromBytes(config), int64(len(config))}
	if _, err := place(s.root, f, blob.digest); err != nil {
		return err
	}
	s.content.unique += blob.size
	var listed []string
	for _, l := range append(layers, blob) {
		if err := repo.LinkLayer(ctx, l.digest); err != nil {
			return err
		}
		listed = append(listed, fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","size":%d,"digest":%q}`, l.size, l.digest))
	}
	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","size":%d,"digest":%q},"layers":[%s]}`,
		manifestType, blob.size, blob.digest, strings.Join(listed[:len(layers)], ","))
	if len(s.content.repositories) == 0 || s.content.repositories[len(s.content.repositories)-1] != name {
		s.content.repositories = append(s.content.repositories, name)
	}
	return repo.PutManifest(ctx, digest.FromBytes(manifest), manifest, tag)
}

func (s *seeder) layers(n int, size int64) (all []seededBlob, err error) {
	for range n {
		l, err := s.layer(size)
		if err != nil {
			return nil, err
		}
		all = append(all, l)
	}
	return all, nil
}

// seedImages makes 200 images: some layers are common to all repositories, some
// to a repository's images, and two are each image's own.
func seedImages(root string) (syncContent, error) {
	return seedStore(root, func(ctx context.Context, s *seeder) error {
		common, err := s.layers(8, syncCommon)
		if err != nil {
			return err
		}
		for r := range syncRepositories {
			shared, err := s.layers(4, syncShared)
			if err != nil {
				return err
			}
			for i := range syncImages {
				own, err := s.layers(2, syncOwn)
				if err != nil {
					return err
				}
				layers := append([]seededBlob{common[i%8], common[(i+r)%8]}, shared[i%4], shared[(i+1)%4])
				if layers[0] == layers[1] {
					layers = layers[1:]
				}
				if err := s.image(ctx, fmt.Sprintf("team/app%d", r), fmt.Sprintf("v1.%d", i), append(layers, own...)...); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// seedTags makes many small images in 50 repositories.
func seedTags(root string) (syncContent, error) {
	return seedStore(root, func(ctx context.Context, s *seeder) error {
		common, err := s.layer(10_000)
		if err != nil {
			return err
		}
		for i := range syncTags {
			if err := s.image(ctx, fmt.Sprintf("team/tool%02d", i*50/syncTags), fmt.Sprintf("v%d", i), common); err != nil {
				return err
			}
		}
		return nil
	})
}

// seedLayers makes one image of layers of different sizes.
func seedLayers(root string, size int64) (syncContent, error) {
	return seedStore(root, func(ctx context.Context, s *seeder) error {
		var layers []seededBlob
		for _, part := range []int64{2, 4, 4, 8} {
			l, err := s.layer(size / part)
			if err != nil {
				return err
			}
			layers = append(layers, l)
		}
		return s.image(ctx, "team/app", "v1", layers...)
	})
}

// seedLarge makes one image of so many layers of 1 GiB that take no time to write.
func seedLarge(root string, n int) (syncContent, error) {
	return seedStore(root, func(ctx context.Context, s *seeder) error {
		digests, err := writeLarge(root, n)
		if err != nil {
			return err
		}
		var layers []seededBlob
		for i, d := range digests {
			layers = append(layers, seededBlob{d, largeSize + int64(i+1)*4096})
		}
		return errors.Join(s.image(ctx, "team/large", "v1", layers...))
	})
}
