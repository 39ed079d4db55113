// Package machine is the inside of one machine of a test cluster: process 1 of
// its pid namespace, which lays out the file system, starts the machine's
// services, reaps what they leave behind and answers on a socket.
//
// When process 1 goes, the kernel ends every process, mount and network device
// of the machine. Nothing else has to be cleaned up from outside, however the
// end came.
//
// It imports only the standard library and golang.org/x/sys.
package machine

// LifelineFD is the descriptor on which process 1 waits for end of file: the
// other end is held by whoever started the machine, and the machine ends with
// it unless it was told to Detach.
const LifelineFD = 3

// Spec describes a machine before it starts.
type Spec struct {
	// Hostname is the machine's host name; required.
	Hostname string `json:"hostname"`
	// Socket is the absolute path, on the host, of the control socket;
	// required.
	Socket string `json:"socket"`
	// Overlay is a directory on a tmpfs of the surrounding mount namespace
	// that takes what the machine writes over the host's root. Empty: the
	// machine keeps the host's root, with mounts of its own.
	Overlay string `json:"overlay,omitempty"`
	// Remove lists paths of the host that the machine must not inherit. They
	// are removed when the overlay is still empty, from the overlay alone.
	Remove []string `json:"remove,omitempty"`
	// Tmpfs lists directories that start empty at every start.
	Tmpfs []string `json:"tmpfs,omitempty"`
	// Binds lists directories of the host that the machine sees.
	Binds []Bind `json:"binds,omitempty"`
	// Sysctls are written at every start; a key that the kernel does not
	// have is passed over.
	Sysctls map[string]string `json:"sysctls,omitempty"`
}

// Bind makes Source, a directory on the host, appear as Target.
type Bind struct {
	Source   string `json:"source"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// Service is a program that runs until it is stopped. One that ends by itself
// is started again a second later, as a service manager does.
type Service struct {
	// Name identifies the service in its machine.
	Name string `json:"name"`
	// Args is the program, an absolute path, and its arguments.
	Args []string `json:"args"`
	// Env is the whole environment.
	Env []string `json:"env,omitempty"`
	// Log is the file that takes both outputs, appended to.
	Log string `json:"log"`
}

// Status is the state of one service.
type Status struct {
	Name string `json:"name"`
	// PID is the process id inside the machine; 0 while it is not running.
	PID int `json:"pid"`
	// Exits counts how often it ended without having been stopped.
	Exits int `json:"exits"`
}

// request is one line to the control socket, response the one that answers.
type request struct {
	Op      string  `json:"op"`
	Service Service `json:"service,omitzero"`
}

type response struct {
	Error    string   `json:"error,omitempty"`
	Services []Status `json:"services,omitempty"`
}

const (
	opStart  = "start"
	opStop   = "stop"
	opList   = "list"
	opDetach = "detach"
)
