package cache

import "time"

// HoldBackWhole is the size in bytes up to which a body is verified before
// its first byte is served.
const HoldBackWhole = 4 << 20

const (
	// holdBackTail is how much of a larger body waits for its digest.
	holdBackTail = 64 << 10

	// maxManifest is the largest manifest taken: what containerd and
	// distribution accept, and as small as what is held back whole.
	maxManifest = HoldBackWhole

	// manifestMemory bounds the manifests held in memory.
	manifestMemory = 16 << 20

	// farRange is how far beyond what is on disk a range may start and still
	// wait for a download from the beginning. A resumed pull that lies
	// farther ahead is passed on, or it would be slower than without a cache.
	farRange = 16 << 20

	// fillChunk is the most that is read, hashed and written at a time: four TLS
	// records, for the calls that one each would take. The kernel's page cache
	// takes it in at less cost than smaller and larger pieces.
	fillChunk = 64 << 10

	// smallBlob is not worth preparations against a full disk or a crash.
	smallBlob = 256 << 10

	// stallMargin is how long after a stall its consequences are waited for.
	stallMargin = 100 * time.Millisecond

	// firstAgain is when an upstream that let somebody wait in vain is first
	// asked again, mostAgain the longest time between two such attempts, and
	// silenceMemory for how long they go on when nobody wants the answer. One that
	// falls silent again within that time of its answer is left alone relapse
	// times longer than before.
	firstAgain    = time.Second
	mostAgain     = 4 * time.Second
	silenceMemory = time.Minute
	relapse       = 8

	// maxSilences bounds on how many matters an upstream may be silent, besides
	// everything.
	maxSilences = 64

	// aheadStretch is how long it is measured how much an image's downloads bring
	// together, or longer until that is aheadSample, but not longer than
	// longestStretch; aheadSettle is how long they settle before. What they bring
	// while one goes ahead must be at least asFast of what they bring otherwise;
	// that is compared anew aheadFor later. After it was less, it is tried again
	// after aheadRetry, next time four times later, up to mostAheadRetry.
	aheadSettle    = 50 * time.Millisecond
	aheadStretch   = 50 * time.Millisecond
	longestStretch = time.Second
	aheadSample    = 2 << 20
	asFast         = 0.8
	aheadFor       = 2 * time.Second
	aheadRetry     = 4 * time.Second
	mostAheadRetry = time.Minute

	// mostHeldBack is the longest that a download holds back before it reads on.
	mostHeldBack = 100 * time.Millisecond

	// sequenceMemory is among how many manifests a layer is looked for.
	sequenceMemory = 32

	// maxBreaks is how often the download of a blob may break off and still go
	// on with the next upstream.
	maxBreaks = 16

	// checkpointEvery is the most that a crash makes a download repeat.
	checkpointEvery = 16 << 20

	// badContentMemory is for how long an upstream is not asked again for a
	// digest that it had wrong.
	badContentMemory = 10 * time.Minute

	// noSpaceMemory is for how long a blob that could not be stored is passed
	// through without another try.
	noSpaceMemory = 10 * time.Second

	// partialAge is how long the beginning of a blob is kept for a download
	// to continue from.
	partialAge = 24 * time.Hour

	// trimEvery is how often the bounds of the store are looked after, besides
	// before every download, and pruneEvery how often old notes are removed.
	trimEvery  = 10 * time.Second
	pruneEvery = 6 * time.Hour

	// touchEvery throttles the recording of uses on disk.
	touchEvery = time.Hour

	// doubtWindow is how soon a blob must be read again to be hashed first, and
	// doubtEvery how often that can happen to it.
	doubtWindow = 10 * time.Minute
	doubtEvery  = time.Hour

	// scrubRate is how fast stored blobs are read again to find decay, in bytes
	// per second; every blob once in scrubEvery, beginning scrubDelay after the
	// start. scrubChunk is read at a time.
	scrubRate  = 4 << 20
	scrubEvery = 7 * 24 * time.Hour
	scrubDelay = 10 * time.Minute
	scrubChunk = 256 << 10

	// rewriteRetry spaces the attempts to write permissions to a failing disk.
	rewriteRetry = time.Minute

	// headerTimeout and idleTimeout are what a client gets to send the head of a
	// request in, and to begin the next one.
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute

	// shutdownGrace is what open transfers get to finish in.
	shutdownGrace = 2 * time.Second
)
