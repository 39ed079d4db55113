package storage

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// The stress test has so little time between condemning and deleting that pushes
// are always in the middle of it.
const (
	stressMinAge = 150 * time.Millisecond
	stressGrace  = 20 * time.Millisecond
)

// pusher does what a client and a registry do between them. It alone changes its
// tags, so that it knows what must be there.
type pusher struct {
	t      *testing.T
	stores []*Store
	rand   *rand.Rand
	repos  []string
	tags   map[string]digest.Digest // repository:tag, as acknowledged
	needs  map[digest.Digest][]digest.Digest
	id     int
	again  *atomic.Int64 // pushes that had to be made again
}

func newPusher(t *testing.T, stores []*Store, id int, again *atomic.Int64) *pusher {
	t.Helper()
	return &pusher{
		t: t, stores: stores, rand: rand.New(rand.NewPCG(uint64(id), rand.Uint64())), repos: []string{"a", "a/b", "c"},
		tags: make(map[string]digest.Digest), needs: make(map[digest.Digest][]digest.Digest), id: id, again: again,
	}
}

func (p *pusher) store() *Store { return p.stores[p.rand.IntN(len(p.stores))] }

func (p *pusher) repo(name string) Repository {
	r, err := p.store().Repository(name)
	if err != nil {
		panic(err)
	}
	return r
}

// blob has a blob be in a repository, as a client does it: only what is not there
// is sent. Contents are few, so that they are shared and come again.
func (p *pusher) blob(ctx context.Context, repo string) (digest.Digest, error) {
	content := fmt.Appendf(nil, "content %d", p.rand.IntN(40))
	d := digest.FromBytes(content)
	if f, err := p.repo(repo).OpenLayer(ctx, d); err == nil {
		return d, f.Close()
	}
	from := p.repos[p.rand.IntN(len(p.repos))]
	if err := p.repo(repo).MountLayer(ctx, p.repo(from), d); err == nil {
		return d, nil
	}
	_, err := upload(ctx, p.store(), repo, content)
	return d, err
}

// manifest pushes a manifest, after it has looked for what it needs as a
// registry does.
func (p *pusher) manifest(ctx context.Context, repo string, content []byte, needs []digest.Digest, tags ...string) (digest.Digest, error) {
	began := time.Now()
	for _, need := range needs {
		f, err := p.repo(repo).OpenLayer(ctx, need)
		if err != nil {
			return "", err
		}
		f.Close()
	}
	d := digest.FromBytes(content)
	p.needs[d] = needs
	err := p.repo(repo).PutManifest(ctx, d, content, tags...)
	if err == nil && time.Since(began) >= stressMinAge {
		// On a machine that is as slow as that, what was looked for may have
		// been old, and gone, before the tag held it. Nothing promises more.
		err = p.complete(ctx, repo, d)
	}
	return d, err
}

func (p *pusher) image(ctx context.Context, repo string, tags ...string) (digest.Digest, error) {
	var layers []digest.Digest
	for range 1 + p.rand.IntN(3) {
		d, err := p.blob(ctx, repo)
		if err != nil {
			return "", err
		}
		layers = append(layers, d)
	}
	// Some images come again, and some are unique.
	note := ""
	if p.rand.IntN(2) == 0 {
		note = fmt.Sprint(p.id, p.rand.Int64())
	}
	return p.manifest(ctx, repo, manifestOf("", layers, nil, note), layers, tags...)
}

// index pushes an index of two images without a tag, and a signature of it.
func (p *pusher) index(ctx context.Context, repo, tag string) (digest.Digest, error) {
	var children []digest.Digest
	for range 2 {
		d, err := p.image(ctx, repo)
		if err != nil {
			return "", err
		}
		children = append(children, d)
	}
	for _, d := range children {
		if err := p.repo(repo).UseManifest(ctx, d); err != nil {
			return "", err
		}
	}
	content := manifestOf("", nil, children, fmt.Sprint(p.id, p.rand.Int64()))
	d := digest.FromBytes(content)
	if err := p.repo(repo).PutManifest(ctx, d, content, tag); err != nil {
		return "", err
	}
	signature := manifestOf(d, nil, nil, "")
	p.needs[d] = append(children, digest.FromBytes(signature))
	if err := p.repo(repo).UseManifest(ctx, d); err != nil {
		return "", err
	}
	if err := p.repo(repo).PutManifest(ctx, digest.FromBytes(signature), signature); err != nil {
		return "", err
	}
	return d, p.complete(ctx, repo, d)
}

// complete reads all of an image.
func (p *pusher) complete(ctx context.Context, repo string, d digest.Digest) error {
	f, err := p.repo(repo).OpenManifest(ctx, d)
	if err != nil {
		return fmt.Errorf("manifest %s: %w", d, err)
	}
	f.Close()
	for _, need := range p.needs[d] {
		if _, isManifest := p.needs[need]; isManifest {
			if err := p.complete(ctx, repo, need); err != nil {
				return err
			}
			continue
		}
		f, err := p.repo(repo).OpenLayer(ctx, need)
		if errors.Is(err, fs.ErrNotExist) {
			f, err = p.repo(repo).OpenManifest(ctx, need)
		}
		if err != nil {
			return fmt.Errorf("%s of %s: %w", need, d, err)
		}
		f.Close()
	}
	return nil
}

// round does one thing to one tag, and reads another.
func (p *pusher) round(ctx context.Context) error {
	repo := p.repos[p.rand.IntN(len(p.repos))]
	tag := fmt.Sprintf("p%d-%d", p.id, p.rand.IntN(4))
	name := repo + ":" + tag
	var d digest.Digest
	var err error
	switch p.rand.IntN(6) {
	case 0:
		if _, ok := p.tags[name]; ok {
			delete(p.tags, name)
			return p.repo(repo).DeleteTag(ctx, tag)
		}
		return nil
	case 1:
		// A manifest of which only this tag knows, for deletion takes it from
		// every tag.
		content := manifestOf("", nil, nil, name+fmt.Sprint(p.rand.Int64()))
		if d, err = p.manifest(ctx, repo, content, nil, tag); err == nil {
			delete(p.tags, name)
			return p.repo(repo).DeleteManifest(ctx, d)
		}
	case 2:
		d, err = p.index(ctx, repo, tag)
	default:
		d, err = p.image(ctx, repo, tag)
	}
	if errors.Is(err, fs.ErrNotExist) {
		// Nothing was acknowledged; a client that took longer between looking
		// and pushing than content lives has to begin again. What the tag
		// names now is not known.
		delete(p.tags, name)
		p.again.Add(1)
		return ignoreAbsent(p.repo(repo).DeleteTag(ctx, tag))
	}
	if err != nil {
		return err
	}
	p.tags[name] = d
	for name, d := range p.tags { // any one
		repo, _, _ := strings.Cut(name, ":")
		return p.complete(ctx, repo, d)
	}
	return nil
}

// settle waits until everything is old, and collects until nothing waits any more.
func settle(t *testing.T, s *Store, old, minAge, grace time.Duration) {
	t.Helper()
	time.Sleep(old)
	for range 100 {
		c, err := s.pass(t.Context(), minAge, grace)
		if err != nil {
			t.Fatal(err)
		}
		if c.Waiting == 0 {
			return
		}
		time.Sleep(grace)
	}
	t.Fatal("the collector never comes to an end")
}

// TestCollectWhilePushing has pushers at two replicas, and the collector of a
// third process going round all the time.
func TestCollectWhilePushing(t *testing.T) {
	root := t.TempDir()
	stores := []*Store{collector(t, root), collector(t, root)}
	leader := collector(t, root)
	ctx, cancel := context.WithCancel(t.Context())
	var collecting, pushing sync.WaitGroup
	var passes, freed int
	collecting.Go(func() {
		for ctx.Err() == nil {
			c, err := leader.pass(ctx, stressMinAge, stressGrace)
			if err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
			passes++
			freed += c.Blobs
		}
	})
	var pushers []*pusher
	var again atomic.Int64
	for id := range 4 {
		p := newPusher(t, stores, id, &again)
		pushers = append(pushers, p)
		pushing.Go(func() {
			for range stressRounds() {
				if err := p.round(ctx); err != nil {
					t.Errorf("pusher %d: %v", id, err)
					return
				}
			}
		})
	}
	pushing.Wait()
	cancel()
	collecting.Wait()
	if passes < 3 || freed == 0 {
		t.Errorf("only %d passes, which freed %d blobs", passes, freed)
	}
	t.Logf("%d passes freed %d blobs; %d pushes were made again", passes, freed, again.Load())
	settle(t, leader, stressMinAge+stressGrace, stressMinAge, stressGrace)
	want := make(map[digest.Digest]bool)
	for _, p := range pushers {
		p.reachable(want)
	}
	got, litter := stored(t, leader)
	for d := range want {
		if !got[d] {
			t.Errorf("%s is lost", d)
		}
	}
	for d := range got {
		if !want[d] {
			t.Errorf("%s is left over", d)
		}
	}
	if len(litter) > 0 {
		t.Errorf("litter: %q", litter)
	}
	for _, p := range pushers {
		p.check()
	}
}

// check pulls what the tags name, whole.
func (p *pusher) check() {
	p.t.Helper()
	for name, d := range p.tags {
		repo, _, _ := strings.Cut(name, ":")
		if err := p.complete(p.t.Context(), repo, d); err != nil {
			p.t.Errorf("%s: %v", name, err)
		}
	}
}

func (p *pusher) reachable(want map[digest.Digest]bool) {
	var add func(d digest.Digest)
	add = func(d digest.Digest) {
		want[d] = true
		for _, need := range p.needs[d] {
			add(need)
		}
	}
	for _, d := range p.tags {
		add(d)
	}
}

// stressRounds is how much each pusher does. STORAGE_TEST_ROUNDS makes it go on
// for longer.
func stressRounds() int {
	n := 60
	if s := os.Getenv("STORAGE_TEST_ROUNDS"); s != "" {
		fmt.Sscan(s, &n)
	}
	return n
}

// collectUntilKilled makes garbage and collects it. It says which tags it has
// pushed, each before the next.
func collectUntilKilled(root string) {
	ctx := context.Background()
	s, err := Open(ctx, Config{Root: root})
	if err != nil {
		fmt.Println("error", err)
		return
	}
	s.renewAfter = 0
	repo, _ := s.Repository("kept")
	junk, _ := s.Repository("junk")
	for i := 0; ; i++ {
		d, err := upload(ctx, s, "kept", random(1000))
		if err == nil {
			content := manifestOf("", []digest.Digest{d}, nil, "")
			err = repo.PutManifest(ctx, digest.FromBytes(content), content, digest.FromBytes(content).Encoded())
			if err == nil {
				fmt.Println("kept", digest.FromBytes(content), d)
			}
		}
		for range 5 {
			content := manifestOf("", nil, nil, fmt.Sprint(rand.Int64()))
			err = errors.Join(err, junk.PutManifest(ctx, digest.FromBytes(content), content))
		}
		for range 3 {
			_, passErr := s.pass(ctx, 0, 0)
			err = errors.Join(err, passErr)
		}
		if err != nil {
			fmt.Println("error", err)
			return
		}
	}
}

func TestKillWhileCollecting(t *testing.T) {
	root := t.TempDir()
	kept := make(map[digest.Digest]bool)
	for range 6 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), crashRootEnv+"="+root, crashJobEnv+"=collect")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 2 + rand.IntN(6); n > 0 && lines.Scan(); n-- {
			noteKept(t, kept, lines.Text())
		}
		time.Sleep(time.Duration(rand.IntN(5000)) * time.Microsecond) // anywhere in a pass
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() {
			noteKept(t, kept, lines.Text())
		}
		cmd.Wait()
	}
	s := collector(t, root)
	settle(t, s, stressMinAge+stressGrace, stressMinAge, stressGrace)
	got, litter := stored(t, s)
	for d := range kept {
		if !got[d] {
			t.Errorf("%s is lost", d)
		}
	}
	// What was pushed and not acknowledged any more may be there as well: a
	// manifest and a layer for each kill.
	if extra := len(got) - len(kept); extra > 12 {
		t.Errorf("%d blobs are left over", extra)
	}
	for _, name := range litter {
		// A driver's temporary file stays until it is certain that nobody
		// writes to it.
		if !strings.HasSuffix(name, ".tmp") && !strings.Contains(name, "/_uploads/") {
			t.Errorf("litter: %s", name)
		}
	}
}

func noteKept(t *testing.T, kept map[digest.Digest]bool, line string) {
	t.Helper()
	words := strings.Fields(line)
	if len(words) == 0 || words[0] == "error" {
		t.Fatal(line)
	}
	if len(words) == 3 && digest.Digest(words[2]).Validate() == nil { // else cut short
		kept[digest.Digest(words[1])], kept[digest.Digest(words[2])] = true, true
	}
}
