package bucket

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
)

// joined is how many objects Google puts together at once.
const joined = 32

// part stores a part, which is an object of its own.
func (g *gcsStore) part(ctx context.Context, _, upload string, number int, content io.ReadSeeker, size int64) (Part, error) {
	name := rand.Text() // so that nobody else's takes its place
	stored, err := g.upload(at(ctx, steady), g.piece(upload, number, name), content, size, nil, url.Values{})
	return Part{Number: number, Size: size, Tag: name + "/" + stored.Version}, err
}

// piece names a part.
func (g *gcsStore) piece(upload string, number int, name string) string {
	return fmt.Sprintf("%s/%05d-%s", g.place(upload), number, name)
}

// source is an object to be put together with others, in one generation of it.
type source struct {
	Name       string `json:"name"`
	Generation string `json:"generation"`
}

// complete joins the parts, then what became of them, until one request is enough.
func (g *gcsStore) complete(ctx context.Context, key, upload string, parts []Part, metadata map[string]string) error {
	sources := make([]source, len(parts))
	for i, p := range parts {
		name, generation, _ := strings.Cut(p.Tag, "/")
		sources[i] = source{g.piece(upload, p.Number, name), generation}
	}
	for stage := 1; len(sources) > joined; stage++ {
		var err error
		if sources, err = g.stage(ctx, fmt.Sprintf("%s/joined-%d", g.place(upload), stage), sources); err != nil {
			return err
		}
	}
	if _, err := g.join(ctx, key, sources, metadata); err != nil {
		return err
	}
	return g.clear(ctx, upload)
}

// stage joins as many as can be, again and again.
func (g *gcsStore) stage(ctx context.Context, name string, sources []source) ([]source, error) {
	groups := slices.Collect(slices.Chunk(sources, joined))
	made := make([]source, len(groups))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(8)
	for i, some := range groups {
		group.Go(func() (err error) {
			made[i], err = g.join(ctx, fmt.Sprintf("%s-%05d", name, i), some, nil)
			return err
		})
	}
	return made, group.Wait()
}

func (g *gcsStore) join(ctx context.Context, to string, sources []source, metadata map[string]string) (source, error) {
	var made gcsObject
	err := g.try(ctx, func() error {
		return g.ask(at(ctx, lengthy), http.MethodPost, g.url(to)+"/compose", url.Values{"fields": {"name,generation"}}, struct {
			Sources     []source  `json:"sourceObjects"`
			Destination gcsObject `json:"destination"`
		}{sources, describe(to, metadata)}, &made)
	})
	return source{to, made.Generation}, err
}

// clear deletes what an upload consists of.
func (g *gcsStore) clear(ctx context.Context, upload string) error {
	for token := ""; ; {
		var page gcsPage
		err := g.try(ctx, func() (err error) {
			page, err = g.page(ctx, g.place(upload)+"/", "", "", token)
			return err
		})
		if err != nil {
			return err
		}
		group, inner := errgroup.WithContext(ctx)
		group.SetLimit(8)
		for _, o := range page.Items {
			group.Go(func() error {
				return g.try(inner, func() error {
					if err := g.delete(inner, o.Name); err != nil && g.classify(err).kind != missing {
						return err
					}
					return nil
				})
			})
		}
		if err := group.Wait(); err != nil || page.NextPageToken == "" {
			return err
		}
		token = page.NextPageToken
	}
}

func (g *gcsStore) abort(ctx context.Context, _, upload string) error { return g.clear(ctx, upload) }

func (g *gcsStore) uploads(ctx context.Context, prefix, token string) ([]Unfinished, string, error) {
	page, err := g.page(ctx, g.place(""), "", "/", token)
	if err != nil {
		return nil, "", err
	}
	var found []Unfinished
	for _, name := range page.Prefixes {
		if u, ok := g.find(name, prefix); ok {
			found = append(found, u)
		}
	}
	return found, page.NextPageToken, nil
}

// copy goes on as long as Google says that there is more to do.
func (g *gcsStore) copy(ctx context.Context, from, version, to string, metadata map[string]string) error {
	if len(metadata) == 0 {
		metadata = map[string]string{writer: "copy"} // or the source's would be taken
	}
	query := url.Values{"fields": {"done,rewriteToken"}}
	if version != "" {
		query.Set("sourceGeneration", version)
		query.Set("ifSourceGenerationMatch", version)
	}
	for {
		var answer struct {
			Done  bool   `json:"done"`
			Token string `json:"rewriteToken"`
		}
		err := g.try(ctx, func() error {
			return g.ask(at(ctx, lengthy), http.MethodPost, g.url(from)+"/rewriteTo/b/"+g.bucket+"/o/"+url.PathEscape(to), query, describe("", metadata), &answer)
		})
		if err != nil || answer.Done {
			return err
		}
		query.Set("rewriteToken", answer.Token)
	}
}

func (g *gcsStore) try(ctx context.Context, act func() error) error { return try(ctx, g.classify, act) }
