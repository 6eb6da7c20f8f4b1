package server

import (
	"context"
	"errors"
	"slices"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ErrorDomain is the domain of every google.rpc.ErrorInfo that an agent sends.
const ErrorDomain = "hamesh.io"

// What a [ControlSink] or [MeshPeer] may answer, wrapped with what it was about; the
// caller gets the code and the reason that the error table has for it.
var (
	ErrVIPUnknown       = errors.New("no such VIP is configured")
	ErrNodeUnknown      = errors.New("no such node is configured")
	ErrNodeNotEligible  = errors.New("the node may not take the VIP now")
	ErrNoOtherCandidate = errors.New("no other candidate may take the VIP now")
	ErrNoOwner          = errors.New("the VIP has no owner now")
	ErrMoveInProgress   = errors.New("another move of the VIP is in progress")
	ErrMoveFailed       = errors.New("the move failed")
	ErrOwnerUnreachable = errors.New("the VIP's owner cannot be reached")
	ErrStoreUnavailable = errors.New("the store does not answer")

	ErrProxyUnknown   = errors.New("no such proxy is configured")
	ErrBackendUnknown = errors.New("no such backend is configured")
	ErrLastBackend    = errors.New("no other backend of the proxy is up")
	ErrLastCandidate  = errors.New("no other candidate may take the node's VIPs now")
	ErrStateInvalid   = errors.New("the state is none of active, draining and disabled")
	ErrRequestID      = errors.New("the request_id cannot be used")

	ErrCrashUnconfirmed = errors.New("a crash is ordered only with confirm set")
	ErrNotHealthy       = errors.New("the mesh is not healthy")
	ErrNoMajority       = errors.New("too few members would stay for a majority")
	ErrNodeUnreachable  = errors.New("the node cannot be reached")
)

// What the server itself answers.
var (
	errUnidentified   = errors.New("the certificate names no role in this mesh")
	errRole           = errors.New("the caller's role does not allow this call")
	errNotAPeer       = errors.New("the caller is no other member of this mesh")
	errForeignMember  = errors.New("the message speaks for a member other than its sender")
	errEmptyHeartbeat = errors.New("the request holds no heartbeat")
	errEventID        = errors.New("that is not the id of an event")
	errStopping       = errors.New("the agent is stopping")
	errPanic          = errors.New("internal error, see the agent's log")
)

var errorTable = []struct {
	err    error
	code   codes.Code
	reason string
}{
	{ErrVIPUnknown, codes.NotFound, "VIP_UNKNOWN"},
	{ErrNodeUnknown, codes.NotFound, "NODE_UNKNOWN"},
	{ErrNodeNotEligible, codes.FailedPrecondition, "NODE_NOT_ELIGIBLE"},
	{ErrNoOtherCandidate, codes.FailedPrecondition, "NO_OTHER_CANDIDATE"},
	{ErrNoOwner, codes.FailedPrecondition, "NO_OWNER"},
	{ErrMoveInProgress, codes.Aborted, "MOVE_IN_PROGRESS"},
	{ErrMoveFailed, codes.Aborted, "MOVE_FAILED"},
	{ErrOwnerUnreachable, codes.Unavailable, "OWNER_UNREACHABLE"},
	{ErrStoreUnavailable, codes.Unavailable, "STORE_UNAVAILABLE"},
	{ErrProxyUnknown, codes.NotFound, "PROXY_UNKNOWN"},
	{ErrBackendUnknown, codes.NotFound, "BACKEND_UNKNOWN"},
	{ErrLastBackend, codes.FailedPrecondition, "LAST_BACKEND"},
	{ErrLastCandidate, codes.FailedPrecondition, "LAST_CANDIDATE"},
	{ErrStateInvalid, codes.InvalidArgument, "STATE_INVALID"},
	{ErrRequestID, codes.InvalidArgument, "REQUEST_ID_INVALID"},
	{ErrCrashUnconfirmed, codes.InvalidArgument, "CRASH_UNCONFIRMED"},
	{ErrNotHealthy, codes.FailedPrecondition, "MESH_NOT_HEALTHY"},
	{ErrNoMajority, codes.FailedPrecondition, "NO_MAJORITY"},
	{ErrNodeUnreachable, codes.Unavailable, "NODE_UNREACHABLE"},
	{errEventID, codes.InvalidArgument, "EVENT_ID_INVALID"},
	{errUnidentified, codes.Unauthenticated, "UNIDENTIFIED"},
	{errRole, codes.PermissionDenied, "ROLE_INSUFFICIENT"},
	{errNotAPeer, codes.PermissionDenied, "NOT_A_PEER"},
	{errForeignMember, codes.PermissionDenied, "MEMBER_MISMATCH"},
	{errEmptyHeartbeat, codes.InvalidArgument, "HEARTBEAT_MISSING"},
	{errStopping, codes.Unavailable, "STOPPING"},
	{errPanic, codes.Internal, "INTERNAL"},
}

// Is says whether err is one of the errors above, said here or by another agent.
func Is(err, target error) bool {
	if errors.Is(err, target) {
		return true
	}
	var reason string
	for _, row := range errorTable {
		if errors.Is(target, row.err) {
			reason = row.reason
		}
	}
	st, ok := status.FromError(err)
	return ok && reason != "" && slices.ContainsFunc(st.Details(), func(detail any) bool {
		info, ok := detail.(*errdetails.ErrorInfo)
		return ok && info.GetDomain() == ErrorDomain && info.GetReason() == reason
	})
}

// statusError turns err into what goes over the wire. An error that already is a gRPC
// status, because another agent sent it, keeps its code and reason.
func statusError(err error) error {
	if err == nil {
		return nil
	}
	for _, row := range errorTable {
		if !errors.Is(err, row.err) {
			continue
		}
		st, detailErr := status.New(row.code, err.Error()).WithDetails(
			&errdetails.ErrorInfo{Domain: ErrorDomain, Reason: row.reason})
		if detailErr != nil {
			return status.Error(row.code, err.Error())
		}
		return st.Err()
	}
	if st, ok := status.FromError(err); ok {
		return st.Err()
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.FromContextError(err).Err()
	}
	return status.Error(codes.Unknown, err.Error())
}
