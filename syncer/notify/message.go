package notify

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// message is an event in the JSON format of CloudEvents 1.0.
type message struct {
	SpecVersion     string    `json:"specversion"`
	ID              string    `json:"id"`
	Source          string    `json:"source"`
	Type            string    `json:"type"`
	Subject         string    `json:"subject"`
	Time            time.Time `json:"time"`
	DataContentType string    `json:"datacontenttype"`
	Data            data      `json:"data"`
}

type data struct {
	Action     string        `json:"action"`
	Repository string        `json:"repository"`
	Tag        string        `json:"tag,omitempty"`
	Digest     digest.Digest `json:"digest,omitempty"`
	MediaType  string        `json:"mediaType,omitempty"`
	Size       int64         `json:"size,omitempty"`
	Actor      string        `json:"actor,omitempty"`
}

func newMessage(source string, e Event) message {
	kind := TypePush
	if e.Delete {
		kind = TypeDelete
	}
	subject := e.Repository
	if e.Tag != "" {
		subject += ":" + e.Tag
	}
	if e.Digest != "" {
		subject += "@" + e.Digest.String()
	}
	return message{
		SpecVersion:     "1.0",
		ID:              randomID(),
		Source:          source,
		Type:            kind,
		Subject:         subject,
		Time:            e.Time.UTC(),
		DataContentType: "application/json",
		Data: data{
			Action:     e.action(),
			Repository: e.Repository,
			Tag:        e.Tag,
			Digest:     e.Digest,
			MediaType:  e.MediaType,
			Size:       e.Size,
			Actor:      e.Actor,
		},
	}
}
