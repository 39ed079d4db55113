package v1alpha1

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
)

// The keys of a connection string.
const (
	keyRegistryName = "ConnectedRegistryName"
	keyTokenName    = "SyncTokenName"
	keyPassword     = "SyncTokenPassword"
	keyIdentity     = "ManagedIdentityClientId"
	keyGateway      = "ParentGatewayEndpoint"
	keyProtocol     = "ParentEndpointProtocol"
)

// ConnectionString is what Azure hands out to connect a registry to its parent:
//
//	ConnectedRegistryName=edge;SyncTokenName=edge-sync;SyncTokenPassword=…;ParentGatewayEndpoint=contoso.eastus.data.azurecr.io;ParentEndpointProtocol=https
//
// or the same with ManagedIdentityClientId=… in place of the two token keys.
//
// +kubebuilder:object:generate=false
type ConnectionString struct {
	// RegistryName is the connected registry's name.
	RegistryName string
	// SyncTokenName and SyncTokenPassword are the credentials for the parent.
	// Both are empty in the managed-identity form.
	SyncTokenName     string
	SyncTokenPassword string
	// ManagedIdentityClientID is the identity to use instead.
	ManagedIdentityClientID string
	// ParentGatewayEndpoint is the parent's data endpoint, a host with or
	// without a port. See LoginServer.
	ParentGatewayEndpoint string
	// ParentEndpointProtocol is http or https.
	ParentEndpointProtocol string
}

// ParseConnectionString reads a connection string. Its errors name the key that
// is wrong, and never quote a value.
func ParseConnectionString(s string) (ConnectionString, error) {
	var cs ConnectionString
	fields := cs.fields()
	seen := make(map[string]bool)
	for i, part := range strings.Split(strings.TrimSuffix(s, ";"), ";") {
		key, value, found := strings.Cut(part, "=")
		field := fields[key]
		if field == nil {
			// The key is not quoted: after a semicolon in a password it is the
			// rest of the password.
			return ConnectionString{}, unknownKey(i+1, key, found)
		}
		if seen[key] {
			return ConnectionString{}, fmt.Errorf("connection string: %s occurs twice", key)
		}
		seen[key] = true
		if value == "" {
			return ConnectionString{}, fmt.Errorf("connection string: %s is empty", key)
		}
		if strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
			return ConnectionString{}, fmt.Errorf("connection string: %s has a space or line end in it", key)
		}
		*field = value
	}
	if err := cs.validate(); err != nil {
		return ConnectionString{}, fmt.Errorf("connection string: %w", err)
	}
	return cs, nil
}

func (cs *ConnectionString) fields() map[string]*string {
	return map[string]*string{
		keyRegistryName: &cs.RegistryName,
		keyTokenName:    &cs.SyncTokenName,
		keyPassword:     &cs.SyncTokenPassword,
		keyIdentity:     &cs.ManagedIdentityClientID,
		keyGateway:      &cs.ParentGatewayEndpoint,
		keyProtocol:     &cs.ParentEndpointProtocol,
	}
}

func unknownKey(n int, key string, found bool) error {
	known := []string{keyRegistryName, keyTokenName, keyPassword, keyIdentity, keyGateway, keyProtocol}
	if near := nearest(key, known); found && near != "" {
		return fmt.Errorf("connection string: part %d has an unknown key: did you mean %s?", n, near)
	}
	return fmt.Errorf("connection string: part %d is not KEY=VALUE with one of the keys %s", n, strings.Join(known, ", "))
}

func (cs *ConnectionString) validate() error {
	switch {
	case cs.RegistryName == "":
		return missingKey(keyRegistryName)
	case cs.ManagedIdentityClientID != "" && (cs.SyncTokenName != "" || cs.SyncTokenPassword != ""):
		return fmt.Errorf("has both %s and a sync token: only one of them can be used", keyIdentity)
	case cs.ManagedIdentityClientID == "" && cs.SyncTokenName == "":
		return missingKey(keyTokenName)
	case cs.ManagedIdentityClientID == "" && cs.SyncTokenPassword == "":
		return missingKey(keyPassword)
	case cs.ParentGatewayEndpoint == "":
		return missingKey(keyGateway)
	case cs.ParentEndpointProtocol != "http" && cs.ParentEndpointProtocol != "https":
		return fmt.Errorf("%s must be http or https", keyProtocol)
	case strings.Contains(cs.SyncTokenName, ":"):
		return fmt.Errorf("%s has a colon in it", keyTokenName)
	}
	if err := validateHost(cs.ParentGatewayEndpoint); err != nil {
		return fmt.Errorf("%s is not a host with or without a port", keyGateway)
	}
	return nil
}

func missingKey(key string) error { return errors.New(key + " is missing") }

// LoginServer is the parent's login server: for a data endpoint of Azure,
// <registry>.<region>.data.azurecr.io, that is <registry>.azurecr.io; a parent
// that is itself a connected registry has one endpoint for everything.
func (cs ConnectionString) LoginServer() string {
	registry, rest, _ := strings.Cut(cs.ParentGatewayEndpoint, ".")
	_, suffix, ok := strings.Cut(rest, ".data.azurecr.")
	if !ok || suffix == "" {
		return cs.ParentGatewayEndpoint
	}
	return registry + ".azurecr." + suffix
}

// Reveal is the connection string with its password, as Azure writes it.
func (cs ConnectionString) Reveal() string { return cs.format(cs.SyncTokenPassword) }

// String is the connection string without its password, so that printing one
// gives nothing away. See Reveal.
func (cs ConnectionString) String() string {
	if cs.SyncTokenPassword == "" {
		return cs.format("")
	}
	return cs.format("***")
}

// GoString is String: %#v does not give the password away either.
func (cs ConnectionString) GoString() string { return cs.String() }

// LogValue is String: neither does log/slog.
func (cs ConnectionString) LogValue() slog.Value { return slog.StringValue(cs.String()) }

func (cs ConnectionString) format(password string) string {
	parts := []string{keyRegistryName + "=" + cs.RegistryName}
	if cs.ManagedIdentityClientID != "" {
		parts = append(parts, keyIdentity+"="+cs.ManagedIdentityClientID)
	} else {
		parts = append(parts, keyTokenName+"="+cs.SyncTokenName, keyPassword+"="+password)
	}
	parts = append(parts, keyGateway+"="+cs.ParentGatewayEndpoint, keyProtocol+"="+cs.ParentEndpointProtocol)
	return strings.Join(parts, ";")
}
