package syncer

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ggcr "github.com/google/go-containerregistry/pkg/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

func TestPlanRemovals(t *testing.T) {
	const held = " tags are gone at the parent or no longer selected, more than the 50 % of spec.sync.maxRemovals: they go with a synchronisation by hand"
	for name, tt := range map[string]struct {
		here, stay string
		rules      removalRules
		want       removals
	}{
		"nothing here":        {"", "", removalRules{percent: 50}, removals{}},
		"all stay":            {"a b", "a b c", removalRules{percent: 1}, removals{}},
		"half":                {"a b c d", "a b", removalRules{percent: 50}, removals{tags: []string{"c", "d"}}},
		"more than half":      {"a b c", "a", removalRules{percent: 50}, removals{held: "2 of 3" + held}},
		"the only one":        {"a", "", removalRules{percent: 50}, removals{held: "1 of 1" + held}},
		"more, by hand":       {"a b c", "a", removalRules{percent: 50, manual: true}, removals{tags: []string{"b", "c"}}},
		"all, where allowed":  {"a b", "", removalRules{percent: 100}, removals{tags: []string{"a", "b"}}},
		"silent":              {"a b", "", removalRules{percent: 100, manual: true, silent: true}, removals{held: "2 of 2 tags stay although the parent lists none at all: if it says so again in the next synchronisation, they go"}},
		"silent, nothing new": {"a", "a", removalRules{percent: 50, silent: true}, removals{}},
	} {
		stay := make(map[string]bool)
		for tag := range strings.FieldsSeq(tt.stay) {
			stay[tag] = true
		}
		got := planRemovals(strings.Fields(tt.here), stay, tt.rules)
		if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(removals{})); diff != "" {
			t.Errorf("%s: -want +got:\n%s", name, diff)
		}
	}
}

// removing is a fixture that removes what is gone of the repositories, on a
// schedule.
func removing(t *testing.T, root string, p *testParent, repositories ...v1alpha1.Repository) *fixture {
	t.Helper()
	f := newFixtureAt(t, root, p, func(c *Config) {
		c.Repositories = repositories
		c.DeletePropagation = true
	})
	f.limits.attempts = 1
	return f
}

func (f *fixture) tagsHere(t *testing.T, repository string) string {
	t.Helper()
	tags, err := f.Syncer.store.tags(t.Context(), repository)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(tags, " ")
}

// pushTags pushes an image of its own under each tag of app.
func (p *testParent) pushTags(t *testing.T, tags string) map[string]ggcr.Image {
	t.Helper()
	images := make(map[string]ggcr.Image)
	for i, tag := range strings.Fields(tags) {
		images[tag] = testImage(t, tag, testLayer(uint64(i), 1000))
		p.pushImage(t, "app:"+tag, images[tag])
	}
	return images
}

func TestSyncRemovesTags(t *testing.T) {
	p := newTestParent(t)
	images := p.pushTags(t, "1 2 3 4")
	root := t.TempDir()
	f := removing(t, root, p, exactly("app")...)
	f.mustSync(t)
	p.delete(t, "app/manifests/3")

	plan, err := f.Plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if last := plan.Repositories[0].Tags[3]; last.Name != "3" || last.Action != ActionRemove || f.tagsHere(t, "app") != "1 2 3 4" {
		t.Errorf("planned %+v, and %s are here", last, f.tagsHere(t, "app"))
	}
	result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule)
	if err != nil || result.TagsRemoved != 1 || f.tagsHere(t, "app") != "1 2 4" {
		t.Errorf("%+v %v, and %s are here", result, err, f.tagsHere(t, "app"))
	}
	if e := f.events[len(f.events)-1]; e.Kind != EventRemoved || e.Repository != "app" || e.Tag != "3" {
		t.Errorf("the last event is %+v", e)
	}
	f.verifyHere(t, "app", digestOf(t, images["3"]), nil) // until garbage is collected

	// What is no longer selected goes too, and comes again.
	fewer := removing(t, root, p, v1alpha1.Repository{Name: "app", Tags: v1alpha1.Tags{Newest: 2}})
	if result, err := fewer.Sync(t.Context(), v1alpha1.SyncTriggerSchedule); err != nil || result.TagsRemoved != 1 || f.tagsHere(t, "app") != "2 4" {
		t.Errorf("%+v %v, and %s are here", result, err, f.tagsHere(t, "app"))
	}
	if result := f.mustSync(t); result.TagsUpdated != 1 || result.TagsRemoved != 0 || f.tagsHere(t, "app") != "1 2 4" {
		t.Errorf("%+v, and %s are here", result, f.tagsHere(t, "app"))
	}
}

// Unless it was asked for, nothing is removed.
func TestSyncKeepsTagsByDefault(t *testing.T) {
	p := newTestParent(t)
	p.pushTags(t, "1 2 3")
	f := newFixture(t, p, exactly("app")...)
	f.mustSync(t)
	p.delete(t, "app/manifests/3")
	if result := f.mustSync(t); result.TagsRemoved != 0 || f.tagsHere(t, "app") != "1 2 3" {
		t.Errorf("%+v, and %s are here", result, f.tagsHere(t, "app"))
	}
}

// A parent that fails or answers strangely takes nothing away, not even by hand.
func TestSyncRemovesNothingOfAFailingParent(t *testing.T) {
	status := func(code int) func(http.ResponseWriter, *http.Request) {
		return respond(code, "application/json", "{}")
	}
	list := func(body string) func(http.ResponseWriter, *http.Request) {
		return respond(http.StatusOK, "application/json", body)
	}
	for name, tt := range map[string]struct {
		match string // part of METHOD PATH
		do    func(http.ResponseWriter, *http.Request)
	}{
		"no repository":         {"tags/list", status(http.StatusNotFound)},
		"no credentials":        {"tags/list", status(http.StatusUnauthorized)},
		"forbidden":             {"tags/list", status(http.StatusForbidden)},
		"list fails":            {"tags/list", status(http.StatusInternalServerError)},
		"list is a web page":    {"tags/list", respond(http.StatusOK, "text/html", "<html>")},
		"list is empty":         {"tags/list", list(`{"name":"app","tags":[]}`)},
		"list is null":          {"tags/list", list(`{"name":"app","tags":null}`)},
		"list is missing":       {"tags/list", list(`{}`)},
		"list is cut short":     {"tags/list", list(`{"name":"app","tags":["1"]}`)},
		"a tag fails":           {"HEAD /v2/app/manifests/2", status(http.StatusBadGateway)},
		"the removed one fails": {"HEAD /v2/app/manifests/3", status(http.StatusBadGateway)},
		"nothing is there":      {"/v2/", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
	} {
		for _, selection := range []v1alpha1.Tags{{}, {Include: []string{"1", "2", "3"}}} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				p := newTestParent(t)
				p.pushTags(t, "1 2 3")
				f := removing(t, t.TempDir(), p, v1alpha1.Repository{Name: "app", Tags: selection})
				f.mustSync(t)
				if !strings.HasPrefix(name, "list is") {
					p.delete(t, "app/manifests/3")
				}
				p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
					if !strings.Contains(r.Method+" "+r.URL.Path, tt.match) {
						return false
					}
					tt.do(w, r)
					return true
				})
				for _, trigger := range []v1alpha1.SyncTrigger{v1alpha1.SyncTriggerSchedule, v1alpha1.SyncTriggerManual, v1alpha1.SyncTriggerManual} {
					result, _ := f.Sync(t.Context(), trigger)
					if result.TagsRemoved != 0 || f.tagsHere(t, "app") != "1 2 3" {
						t.Errorf("%s: %d removed, and %s are here", trigger, result.TagsRemoved, f.tagsHere(t, "app"))
					}
				}
			})
		}
	}
}

// Many at once are held, and reported, until a person wants them gone.
func TestSyncHoldsMassRemovals(t *testing.T) {
	p := newTestParent(t)
	p.pushTags(t, "1 2 3 4")
	f := removing(t, t.TempDir(), p, exactly("app")...)
	f.mustSync(t)
	for _, tag := range []string{"1", "2", "3"} {
		p.delete(t, "app/manifests/"+tag)
	}
	for range 3 {
		result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule)
		if err != nil || result.TagsRemoved != 0 || f.tagsHere(t, "app") != "1 2 3 4" {
			t.Errorf("%+v %v, and %s are here", result, err, f.tagsHere(t, "app"))
		}
	}
	if got := f.Status().Repositories[0]; !strings.HasPrefix(got.RemovalsHeld, "3 of 4 tags") || got.LastError != "" {
		t.Errorf("%+v", got)
	}
	if result := f.mustSync(t); result.TagsRemoved != 3 || f.tagsHere(t, "app") != "4" || f.Status().Repositories[0].RemovalsHeld != "" {
		t.Errorf("%+v, and %s are here", result, f.tagsHere(t, "app"))
	}
}

// That the parent lists nothing is believed when it says so twice in a row.
func TestSyncBelievesAnEmptyListTheSecondTime(t *testing.T) {
	p := newTestParent(t)
	p.pushTags(t, "1 2")
	f := removing(t, t.TempDir(), p, exactly("app")...)
	f.mustSync(t)
	empty := func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.HasSuffix(r.URL.Path, "/tags/list"):
			respond(http.StatusOK, "application/json", `{"name":"app","tags":[]}`)(w, r)
		case strings.Contains(r.URL.Path, "/manifests/"):
			w.WriteHeader(http.StatusNotFound)
		default:
			return false
		}
		return true
	}
	broken := func(w http.ResponseWriter, r *http.Request) bool {
		w.WriteHeader(http.StatusBadGateway)
		return true
	}
	for i, step := range []struct {
		fault func(http.ResponseWriter, *http.Request) bool
		want  string
	}{{empty, "1 2"}, {nil, "1 2"}, {empty, "1 2"}, {broken, "1 2"}, {empty, "1 2"}, {empty, ""}} {
		p.setFault(step.fault)
		_, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
		if got := f.tagsHere(t, "app"); got != step.want || (err != nil) != (i == 3) {
			t.Errorf("step %d: %q are here, %v", i, got, err)
		}
	}
}

// What comes in the place of a tag is here before the tag goes.
func TestSyncRemovesLast(t *testing.T) {
	p := newTestParent(t)
	p.pushTags(t, "1")
	f := removing(t, t.TempDir(), p, exactly("app")...)
	f.mustSync(t)
	p.delete(t, "app/manifests/1")
	p.pushImage(t, "app:2", testImage(t, "two", testLayer(9, 5000)))
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		return false
	})
	if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual); err == nil || f.tagsHere(t, "app") != "1" {
		t.Errorf("%v, and %s are here", err, f.tagsHere(t, "app"))
	}
	p.setFault(nil)
	if result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule); err != nil || result.TagsRemoved != 1 || f.tagsHere(t, "app") != "2" {
		t.Errorf("%+v %v, and %s are here", result, err, f.tagsHere(t, "app"))
	}
}

// A tag that is selected by its name is an error while the parent has none, and
// goes all the same.
func TestSyncRemovesNamedTag(t *testing.T) {
	p := newTestParent(t)
	p.pushTags(t, "1 2")
	f := removing(t, t.TempDir(), p, v1alpha1.Repository{Name: "app", Tags: v1alpha1.Tags{Include: []string{"1", "2"}}})
	f.mustSync(t)
	p.delete(t, "app/manifests/2")
	result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule)
	if err == nil || result.TagsRemoved != 1 || f.tagsHere(t, "app") != "1" {
		t.Errorf("%+v %v, and %s are here", result, err, f.tagsHere(t, "app"))
	}
}

// The tags of a repository that nothing selects any more go by hand.
func TestSyncRemovesUnselectedRepository(t *testing.T) {
	p := newTestParent(t)
	p.pushTags(t, "1 2")
	p.pushImage(t, "other/app:1", testImage(t, "other", testLayer(9, 1000)))
	root := t.TempDir()
	removing(t, root, p, exactly("app", "other/app")...).mustSync(t)
	f := removing(t, root, p, exactly("other/app")...)
	result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule)
	if err != nil || len(result.Repositories) != 2 || !strings.HasPrefix(result.Repositories[0].Held, "2 of 2 tags") || f.tagsHere(t, "app") != "1 2" {
		t.Errorf("%+v %v, and %s are here", result, err, f.tagsHere(t, "app"))
	}
	plan, err := f.Plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []TagPlan{{Name: "1", Action: ActionRemove}, {Name: "2", Action: ActionRemove}}
	if diff := cmp.Diff(want, plan.Repositories[0].Tags, cmp.AllowUnexported(TagPlan{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if result := f.mustSync(t); result.TagsRemoved != 2 || len(result.Repositories) != 1 || f.tagsHere(t, "app") != "" || f.tagsHere(t, "other/app") != "1" {
		t.Errorf("%+v, and %s are here", result, f.tagsHere(t, "app"))
	}
}

// Signatures under cosign's tags stay with their image, and go with the parent's.
func TestSyncRemovesCosignTags(t *testing.T) {
	p := newTestParent(t)
	images := p.pushTags(t, "1 2")
	signature := schemaTag(digestOf(t, images["1"])) + ".sig"
	p.pushImage(t, "app:"+signature, testImage(t, "signature", testLayer(9, 100)))
	f := removing(t, t.TempDir(), p, exactly("app")...)
	for range 2 {
		f.mustSync(t)
		if got := strings.Fields(f.tagsHere(t, "app")); !slices.Equal(got, []string{"1", "2", signature}) {
			t.Errorf("%s are here", got)
		}
	}
	p.delete(t, "app/manifests/"+signature)
	if result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule); err != nil || result.TagsRemoved != 1 || f.tagsHere(t, "app") != "1 2" {
		t.Errorf("%+v %v, and %s are here", result, err, f.tagsHere(t, "app"))
	}
}
