// Command bench measures the registry against distribution's own, the node cache
// against nginx, and synchronisation against regsync, crane and, where it is
// installed, skopeo, which copy to distribution's registry. Both sides of each comparison are processes of their own
// that serve the same files and are asked in turns by the same clients within
// one run, so that what else the machine does falls on both; what counts is the
// ratio, not the rate. It prints a table, in which every line that has a bound
// says whether it was kept.
//
//	go run -C test/bench .
//
// It wants Linux, Go and nginx (the package nginx-light will do), root for the
// containerd that unpacks with overlayfs, about 25 GiB of disk for temporary
// files, and an hour; with -run '^sync' it measures synchronisation
// alone.
//
// It may import registry, registry/auth, registry/cache, storage and syncer, which
// it serves from processes of its own where the program itself offers no way to
// serve them alone or without TLS.
package main
