package daemon

import (
	"maps"
	"sync"

	"github.com/connected-registry/connected-registry/agent"
)

// inputs collect what the daemon is told, the latest of each kind, until it
// looks. Telling does not block.
type inputs struct {
	woken chan struct{} // holds one element when there is something new

	mu   sync.Mutex // guards news
	news news
}

// news is what has come since the last look.
type news struct {
	file    *fileNews
	secrets map[string]seen
	// unreachable says which Secrets cannot be read at present. It is kept from
	// look to look.
	unreachable map[string]error
	report      *agent.Report // kept from look to look
	hangs       bool          // the registry; kept from look to look
	runtime     *runtimeNews
}

type fileNews struct {
	raw []byte
	err error
}

func newInputs() *inputs {
	return &inputs{woken: make(chan struct{}, 1), news: news{secrets: make(map[string]seen), unreachable: make(map[string]error)}}
}

func (in *inputs) wake() {
	select {
	case in.woken <- struct{}{}:
	default:
	}
}

// take returns what is new.
func (in *inputs) take() news {
	in.mu.Lock()
	defer in.mu.Unlock()
	out := in.news
	out.unreachable = maps.Clone(out.unreachable)
	in.news.file, in.news.runtime, in.news.secrets = nil, nil, make(map[string]seen)
	return out
}

func (in *inputs) fileIs(raw []byte, err error) {
	in.mu.Lock()
	in.news.file = &fileNews{raw, err}
	in.mu.Unlock()
	in.wake()
}

func (in *inputs) runtimeIs(r runtimeNews) {
	in.mu.Lock()
	in.news.runtime = &r
	in.mu.Unlock()
	in.wake()
}

func (in *inputs) registryHangs(hangs bool) {
	in.mu.Lock()
	changed := in.news.hangs != hangs
	in.news.hangs = hangs
	in.mu.Unlock()
	if changed {
		in.wake()
	}
}

func (in *inputs) secretIs(name string, s seen) {
	in.mu.Lock()
	in.news.secrets[name] = s
	in.mu.Unlock()
	in.wake()
}

func (in *inputs) secretFails(name string, err error) {
	in.mu.Lock()
	was := in.news.unreachable[name]
	if err == nil {
		delete(in.news.unreachable, name)
	} else {
		in.news.unreachable[name] = err
	}
	in.mu.Unlock()
	if (was == nil) != (err == nil) {
		in.wake()
	}
}

// nodeIs takes a report of the agent's, which comes every few seconds and mostly
// says what the one before did.
func (in *inputs) nodeIs(r agent.Report) {
	in.mu.Lock()
	same := in.news.report != nil && sameReport(*in.news.report, r)
	in.news.report = &r
	in.mu.Unlock()
	if !same {
		in.wake()
	}
}

func sameReport(a, b agent.Report) bool {
	return a.Config.Tag == b.Config.Tag && a.Config.CA.Equal(b.Config.CA) && text(a.Err) == text(b.Err) &&
		len(a.Held) == len(b.Held) && b.Changed == 0
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// forgetReport: what the agent said is no longer so.
func (in *inputs) forgetReport() {
	in.mu.Lock()
	in.news.report = nil
	in.mu.Unlock()
}
