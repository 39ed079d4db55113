// Package replicas has replicas of the registry, real processes on one storage,
// killed at random while real clients push, pull and delete through what a
// Service in a cluster is to them, and while a leader collects garbage; and has
// their disk fill up under pushes. At the end a fresh replica holds everything
// that was acknowledged.
//
// # What clients do about failures
//
// Read from the sources of the versions in go.mod, and of docker:
//
//   - crane (go-containerregistry, remote/options.go, remote/write.go) makes a
//     request, a blob's upload or a manifest's again, three times in all, when a
//     connection was reset or closed and on 408, 429, 500, 502, 503 and 504; not
//     when it was refused, and not in the middle of a blob that it reads.
//   - containerd (core/remotes/docker, resolver.go, httpreadseeker.go) makes a
//     request again, five times in all at 50 ms, when the connection was closed or
//     timed out, and on 408, 429 and, once, 500, 503 and 504; not when it was
//     reset or refused. A blob that it reads goes on by Range after the connection
//     was closed, not after it was reset. The kubelet then pulls again, after 10 s
//     at first, and what was complete is not fetched again.
//   - docker (distribution/xfer) uploads and downloads a layer up to five times,
//     5, 10, 15 and 20 s apart, after any error but a refusal.
//
// So whether a replica's death is seen depends on luck for all three, and each
// has somebody who begins again: docker its transfer manager, containerd the
// kubelet, crane whoever runs it. The tests begin again at most four times, as
// docker does, and sooner than either. What is retried must be a connection that
// broke: an answer that refuses or denies anything is a failure at once, for the
// replicas that live have no reason to give one. And a replica that is told to end
// instead of being killed must not be noticed at all.
package replicas
