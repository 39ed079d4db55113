// Package cache is the pull-through cache that runs on every node, between
// containerd and the registries.
//
// containerd asks it over loopback for "/v2/<repository>/manifests/<reference>"
// and "/v2/<repository>/blobs/<digest>", with "?ns=<registry host>" naming the
// registry that the image reference names (containerd, docs/hosts.md). What is
// stored on the node is served from there; anything else is fetched once from
// the upstreams configured for that registry, streamed to everyone who asks
// while it is written, and kept only if its digest is right.
//
// # What a pull can rely on
//
// The cache never makes a pull fail that would work without it. Whatever it
// cannot give it refuses within about two seconds, in a way that makes
// containerd ask its next host: 401, 403, 404, 405, 416 and 5xx, or a connection
// closed short of Content-Length. It never answers 304, 408 or 429 and never
// with a digest other than that of the bytes.
//
// A body of unknown correctness never ends as a complete body: the last
// part is held back until the digest of the whole is known. Bodies of up to
// [HoldBackWhole] bytes, all manifests among them, are verified before their
// first byte goes out.
//
// # Who may read
//
// The registry decides. A stored blob is served only if the registry has
// answered for that blob in that repository, and has allowed that credential
// (the Authorization header; empty is anonymous) to read the repository within
// [Config].AllowedTTL; otherwise it is asked again. While it cannot be reached,
// answers up to [Config].OfflineTTL old count. Credentials reach only the
// upstreams of the registry that was named, and the disk only as a keyed hash.
//
// Where the registry asks for tokens, the cache leads clients to itself for them
// and passes on what they send to the registry's token service. So it knows the
// credential behind a token, and remembers permissions for that; and it has
// tokens for those whose credentials had been accepted while the registry, and
// its token service, are away.
//
// Other nodes' caches, where they are asked ([PeerConfig]), are shown no
// credential: a node asks them for what the registry has allowed its client.
//
// # The Cache-Status header
//
// Every answer under a known namespace bears one Cache-Status item (RFC 9211)
// that says where its bytes come from:
//
//	connected-registry; hit                        the node's disk, nobody asked
//	connected-registry; hit; detail=checked        the node's disk; the upstream said where the tag
//	                                               points, or that this client may read
//	connected-registry; hit; detail=offline        the node's disk; the upstream is unreachable and
//	                                               its earlier answer was used
//	connected-registry; hit; detail=containerd     containerd's own content store
//	connected-registry; hit; detail=stale-tag      the same, and the reference was a tag, which
//	                                               may have moved since
//	connected-registry; fwd=miss; stored           the upstream; the bytes are being kept
//	connected-registry; fwd=miss; collapsed; stored  the same, joining a fetch already under way
//	connected-registry; fwd=miss                   the upstream; a HEAD, of which nothing is kept
//	connected-registry; fwd=bypass; detail=TOKEN   the upstream, not kept: no-space, disk-error,
//	                                               far-range (a range far beyond what is here),
//	                                               referrers
//	connected-registry; fwd=miss; fwd-status=N     the upstream refused with status N
//	connected-registry; fwd=miss; detail=TOKEN     nothing to serve: unreachable, bad-content,
//	                                               tags-upstream, loop, verifying, stopping
//
// # Imports
//
// The package may import storage (seals) and nothing else of this module.
package cache
